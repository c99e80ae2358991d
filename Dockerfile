# One image for every part: hpo worker, hpo launch, hpo dashboard, hpo best. It runs on NVIDIA GPUs
# and, without one, on the CPU.
FROM python:3.11.14-slim-bookworm

RUN useradd --create-home --uid 10001 hpo \
    && install --directory --owner=hpo --group=hpo /exports /var/lib/hpo

WORKDIR /opt/hpo
# The dependencies, without our code: an edit of that code does not fetch torch again.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY hpo hpo
COPY trainer trainer
COPY storage storage
RUN pip install --no-cache-dir --no-deps .

# Checkpoints, logs and data sets: a volume that the workers share.
ENV HPO_HOME=/var/lib/hpo \
    HPO_DATA=/var/lib/hpo/data
USER hpo
WORKDIR /exports
ENTRYPOINT ["hpo"]
CMD ["--help"]
