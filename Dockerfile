# CPU only. Docker's default 64 MB of /dev/shm are enough, because the shared weights are in a memfd.
#   docker build -t es_lite .
#   docker run --rm -it -v "$PWD/runs:/es_lite/runs" es_lite                                     # the 0.5B recipe
#   docker run --rm -it -v "$PWD/runs:/es_lite/runs" es_lite make train RECIPE=recipes/quickstart.toml
#   docker run --rm -it es_lite make test
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# If pip's default index serves torch with CUDA: --build-arg PIP_EXTRA_INDEX_URL=... with an index of CPU builds.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /es_lite
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY es_lite es_lite
RUN make setup
COPY . .
RUN touch .venv/ready
CMD ["make", "train"]
