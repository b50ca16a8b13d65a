"""From text to items: documents, tokens, samples, and which of them a step draws."""
