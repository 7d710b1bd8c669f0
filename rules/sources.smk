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
        # Conversion holds one file of weights in memory: 10 GB at most on the Hub.
        mem_mb=lambda wildcards: 2000 if wildcards.org == "builtin" else 24000,
        runtime=2880,
    params:
        launch=script("launch.py"),
        script=Planned("models/{org}/{name}@{revision}").script,
        spec=Planned("models/{org}/{name}@{revision}").spec,
        message=Planned("models/{org}/{name}@{revision}").message,
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
        script=Planned("datasets/{org}/{name}@{revision}").script,
        spec=Planned("datasets/{org}/{name}@{revision}").spec,
        message=Planned("datasets/{org}/{name}@{revision}").message,
    message:
        "Dataset: {params.message}"
    shell:
        "python {params.launch:q} --log {log} {params.script:q} --spec {params.spec:q}"
        " --work work/{output} --output {output}"


rule data:
    input:
        ancient(Planned("store/data/{name}").parents),
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
        script=Planned("store/data/{name}").script,
        spec=Planned("store/data/{name}").spec,
        message=Planned("store/data/{name}").message,
    message:
        "{params.message}"
    shell:
        "python {params.launch:q} --log {log} {params.script:q} --spec {params.spec:q} --output {output}"
