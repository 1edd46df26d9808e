# The gateway alone, with its own extra only. Build from the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t headrace-gateway .
# Options come as flags or as HEADRACE_GATEWAY_… variables (docs/running.md).
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY headrace headrace
COPY services/__init__.py services/__init__.py
COPY services/gateway services/gateway
RUN pip install --no-cache-dir -c constraints.txt '.[gateway]'
USER nobody
EXPOSE 8080 50051
CMD ["python", "-m", "services.gateway", "--http", "0.0.0.0:8080", "--grpc", "0.0.0.0:50051"]
