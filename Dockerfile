# elutq serve in a container; docs/deploy.md says how to run it.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python -m venv /opt/elutq && /opt/elutq/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.11-slim
COPY --from=build /opt/elutq /opt/elutq
RUN useradd --system --uid 10001 --no-create-home elutq
USER elutq
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=2m CMD ["/opt/elutq/bin/python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["/opt/elutq/bin/elutq"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
