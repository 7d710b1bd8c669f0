rule sft:
    input:
        ancient(parents("store/sft/{name}")),
    output:
        directory("store/sft/{name}"),
    log:
        "logs/sft/{name}.log",
    benchmark:
        "benchmarks/sft/{name}.tsv"
    conda:
        "../envs/training.yaml"
    threads: run_value("store/sft/{name}", "cores")
    resources:
        nodes=run_value("store/sft/{name}", "nodes"),
        gpus=run_value("store/sft/{name}", "gpus"),
        cpu=run_value("store/sft/{name}", "cores_per_node"),
        mem_mb=run_value("store/sft/{name}", "mem_mb"),
        shm_mb=run_value("store/sft/{name}", "shm_mb"),
        runtime=run_value("store/sft/{name}", "runtime"),
    params:
        launch=script("launch.py"),
        script=planned_script("store/sft/{name}"),
        spec=spec("store/sft/{name}"),
        run=run_options("store/sft/{name}"),
        processes=run_value("store/sft/{name}", "processes"),
        message=describe("store/sft/{name}"),
    message:
        "Step 1: {params.message}"
    shell:
        "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
        " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
        " --work work/sft/{wildcards.name} --board logs/tensorboard/sft/{wildcards.name}"
        " --output {output}"


rule reward:
    input:
        ancient(parents("store/reward/{name}")),
    output:
        directory("store/reward/{name}"),
    log:
        "logs/reward/{name}.log",
    benchmark:
        "benchmarks/reward/{name}.tsv"
    conda:
        "../envs/training.yaml"
    threads: run_value("store/reward/{name}", "cores")
    resources:
        nodes=run_value("store/reward/{name}", "nodes"),
        gpus=run_value("store/reward/{name}", "gpus"),
        cpu=run_value("store/reward/{name}", "cores_per_node"),
        mem_mb=run_value("store/reward/{name}", "mem_mb"),
        shm_mb=run_value("store/reward/{name}", "shm_mb"),
        runtime=run_value("store/reward/{name}", "runtime"),
    params:
        launch=script("launch.py"),
        script=planned_script("store/reward/{name}"),
        spec=spec("store/reward/{name}"),
        run=run_options("store/reward/{name}"),
        processes=run_value("store/reward/{name}", "processes"),
        message=describe("store/reward/{name}"),
    message:
        "Step 2: {params.message}"
    shell:
        "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
        " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
        " --work work/reward/{wildcards.name} --board logs/tensorboard/reward/{wildcards.name}"
        " --output {output}"


rule rlhf:
    input:
        ancient(parents("store/rlhf/{name}")),
    output:
        directory("store/rlhf/{name}"),
    log:
        "logs/rlhf/{name}.log",
    benchmark:
        "benchmarks/rlhf/{name}.tsv"
    conda:
        "../envs/training.yaml"
    threads: run_value("store/rlhf/{name}", "cores")
    resources:
        nodes=run_value("store/rlhf/{name}", "nodes"),
        gpus=run_value("store/rlhf/{name}", "gpus"),
        cpu=run_value("store/rlhf/{name}", "cores_per_node"),
        mem_mb=run_value("store/rlhf/{name}", "mem_mb"),
        shm_mb=run_value("store/rlhf/{name}", "shm_mb"),
        runtime=run_value("store/rlhf/{name}", "runtime"),
    params:
        launch=script("launch.py"),
        script=planned_script("store/rlhf/{name}"),
        spec=spec("store/rlhf/{name}"),
        run=run_options("store/rlhf/{name}"),
        processes=run_value("store/rlhf/{name}", "processes"),
        message=describe("store/rlhf/{name}"),
    message:
        "Step 3: {params.message}"
    shell:
        "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
        " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
        " --work work/rlhf/{wildcards.name} --board logs/tensorboard/rlhf/{wildcards.name}"
        " --output {output}"
