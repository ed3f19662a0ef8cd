"""GPT-4o, or any model behind an OpenAI-compatible server, as a teacher."""
