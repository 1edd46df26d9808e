# The tokenizer alone, with its own extra only. Build from the repository's root:
#   docker build -f deploy/docker/tokenizer.Dockerfile -t headrace-tokenizer .
# Options come as flags or as HEADRACE_TOKENIZER_… variables (docs/running.md).
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY headrace headrace
COPY services/__init__.py services/__init__.py
COPY services/tokenizer services/tokenizer
RUN pip install --no-cache-dir -c constraints.txt '.[tokenizer]'
USER nobody
EXPOSE 50052
CMD ["python", "-m", "services.tokenizer", "--listen", "0.0.0.0:50052"]
