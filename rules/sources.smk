rule model:
    output:
        directory("models/{org}/{name}@{revision}"),
    log:
        "logs/models/{org}/{name}@{revision}.log",
    benchmark:
        "benchmarks/models/{org}/{name}@{revision}.tsv"
    params:
        spec=spec("models/{org}/{name}@{revision}"),
        message=describe("models/{org}/{name}@{revision}"),
    message:
        "Pretrained model: {params.message}"
    shell:
        "{LAUNCH} --log {log} {SCRIPTS}/fetch_model.py --spec {params.spec:q} --output {output}"


rule dataset:
    output:
        directory("datasets/{org}/{name}@{revision}"),
    log:
        "logs/datasets/{org}/{name}@{revision}.log",
    benchmark:
        "benchmarks/datasets/{org}/{name}@{revision}.tsv"
    params:
        spec=spec("datasets/{org}/{name}@{revision}"),
        message=describe("datasets/{org}/{name}@{revision}"),
    message:
        "Dataset: {params.message}"
    shell:
        "{LAUNCH} --log {log} {SCRIPTS}/fetch_dataset.py --spec {params.spec:q} --output {output}"


rule data:
    input:
        ancient(parents("store/data/{name}")),
    output:
        directory("store/data/{name}"),
    log:
        "logs/data/{name}.log",
    benchmark:
        "benchmarks/data/{name}.tsv"
    params:
        spec=spec("store/data/{name}"),
        message=describe("store/data/{name}"),
    message:
        "Data: {params.message}"
    shell:
        "{LAUNCH} --log {log} {SCRIPTS}/prepare_data.py --spec {params.spec:q} --output {output}"
