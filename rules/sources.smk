rule model:
    output:
        directory("models/{org}/{name}@{revision}"),
    log:
        "logs/models/{org}/{name}@{revision}.log",
    benchmark:
        "benchmarks/models/{org}/{name}@{revision}.tsv"
    conda:
        "../envs/training.yaml"
    resources:
        # Of a model that is converted one file of weights is in memory: 10 GB at most on the Hub.
        mem_mb=lambda wildcards: 2000 if wildcards.org == "builtin" else 24000,
        runtime=2880,
    params:
        launch=script("launch.py"),
        script=planned_script("models/{org}/{name}@{revision}"),
        spec=spec("models/{org}/{name}@{revision}"),
        message=describe("models/{org}/{name}@{revision}"),
    message:
        "Pretrained model: {params.message}"
    shell:
        "python {params.launch:q} --log {log} {params.script:q} --spec {params.spec:q}"
        " --work work/{output} --output {output}"


rule dataset:
    output:
        directory("datasets/{org}/{name}@{revision}"),
    log:
        "logs/datasets/{org}/{name}@{revision}.log",
    benchmark:
        "benchmarks/datasets/{org}/{name}@{revision}.tsv"
    conda:
        "../envs/training.yaml"
    resources:
        mem_mb=2000,
        runtime=1440,
    params:
        launch=script("launch.py"),
        script=planned_script("datasets/{org}/{name}@{revision}"),
        spec=spec("datasets/{org}/{name}@{revision}"),
        message=describe("datasets/{org}/{name}@{revision}"),
    message:
        "Dataset: {params.message}"
    shell:
        "python {params.launch:q} --log {log} {params.script:q} --spec {params.spec:q}"
        " --work work/{output} --output {output}"


rule data:
    input:
        ancient(parents("store/data/{name}")),
    output:
        directory("store/data/{name}"),
    log:
        "logs/data/{name}.log",
    benchmark:
        "benchmarks/data/{name}.tsv"
    conda:
        "../envs/training.yaml"
    resources:
        mem_mb=4000,
        runtime=1440,
    params:
        launch=script("launch.py"),
        script=planned_script("store/data/{name}"),
        spec=spec("store/data/{name}"),
        message=describe("store/data/{name}"),
    message:
        "Data: {params.message}"
    shell:
        "python {params.launch:q} --log {log} {params.script:q} --spec {params.spec:q} --output {output}"
