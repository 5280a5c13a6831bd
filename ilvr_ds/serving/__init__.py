"""A trained model at people's service: files of questions, a chat, an endpoint in OpenAI's form."""
