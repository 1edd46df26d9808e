# The worker alone, with its own extra only. Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t headrace-worker .
# Options come as flags or as HEADRACE_WORKER_… variables (docs/running.md).
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY headrace headrace
COPY services/__init__.py services/__init__.py
COPY services/worker services/worker
RUN pip install --no-cache-dir -c constraints.txt '.[worker]'
USER nobody
EXPOSE 50054
CMD ["python", "-m", "services.worker", "--listen", "0.0.0.0:50054"]
