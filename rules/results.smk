rule eval:
    input:
        ancient(parents("store/eval/{name}")),
    output:
        directory("store/eval/{name}"),
    log:
        "logs/eval/{name}.log",
    benchmark:
        "benchmarks/eval/{name}.tsv"
    conda:
        "../envs/training.yaml"
    threads: run_value("store/eval/{name}", "cores")
    resources:
        nodes=run_value("store/eval/{name}", "nodes"),
        gpus=run_value("store/eval/{name}", "gpus"),
        cpu=run_value("store/eval/{name}", "cores_per_node"),
        mem_mb=run_value("store/eval/{name}", "mem_mb"),
        shm_mb=run_value("store/eval/{name}", "shm_mb"),
        runtime=run_value("store/eval/{name}", "runtime"),
    params:
        launch=script("launch.py"),
        script=planned_script("store/eval/{name}"),
        spec=spec("store/eval/{name}"),
        run=run_options("store/eval/{name}"),
        processes=run_value("store/eval/{name}", "processes"),
        message=describe("store/eval/{name}"),
    message:
        "Comparison: {params.message}"
    shell:
        "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
        " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
        " --output {output}"


rule link:
    input:
        ancient(link_source("results/{scenario}/{result}")),
    output:
        directory("results/{scenario}/{result}"),
    log:
        "logs/results/{scenario}/{result}.log",
    benchmark:
        "benchmarks/results/{scenario}/{result}.tsv"
    conda:
        "../envs/training.yaml"
    params:
        target=link_target("results/{scenario}/{result}"),
    message:
        "results/{wildcards.scenario}/{wildcards.result} is a name for {params.target}"
    shell:
        "ln -sfn {params.target} {output} 2> {log}"


rule link_curves:
    input:
        ancient(link_source("results/{scenario}/{stage}/curves.png")),
    output:
        "results/{scenario}/{stage}/curves.png",
    log:
        "logs/results/{scenario}/{stage}/curves.log",
    benchmark:
        "benchmarks/results/{scenario}/{stage}/curves.tsv"
    conda:
        "../envs/training.yaml"
    params:
        target=link_target("results/{scenario}/{stage}/curves.png"),
    message:
        "results/{wildcards.scenario}/{wildcards.stage}/curves.png is a name for {params.target}"
    shell:
        "ln -sfn {params.target} {output} 2> {log}"
