# CPU by default. TPU: docker build --build-arg EXTRAS=tpu .   NVIDIA GPU: docker build --build-arg EXTRAS=gpu .
FROM python:3.12-slim
ARG EXTRAS=export
WORKDIR /src
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY vit_jax ./vit_jax
COPY configs ./configs
RUN pip install --no-cache-dir ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["vit-jax"]
CMD ["--help"]
