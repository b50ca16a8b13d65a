"""Pure functions: noise, formats, the update, shaping, schedules, the record of a step. They touch no file, process or model."""
