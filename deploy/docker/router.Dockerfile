# The router alone, with its own extra only. Build from the repository's root:
#   docker build -f deploy/docker/router.Dockerfile -t headrace-router .
# Options come as flags or as HEADRACE_ROUTER_… variables (docs/running.md).
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY headrace headrace
COPY services/__init__.py services/__init__.py
COPY services/router services/router
RUN pip install --no-cache-dir -c constraints.txt '.[router]'
USER nobody
EXPOSE 50053
CMD ["python", "-m", "services.router", "--listen", "0.0.0.0:50053"]
