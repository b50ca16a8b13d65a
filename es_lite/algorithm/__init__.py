"""Pure functions: noise, formats, the update, shaping, schedules, the record of a step. Touches no file, process or model."""
