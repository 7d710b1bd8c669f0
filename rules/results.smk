rule link:
    input:
        ancient(link_source("results/{scenario}/{result}")),
    output:
        directory("results/{scenario}/{result}"),
    log:
        "logs/results/{scenario}/{result}.log",
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
    conda:
        "../envs/training.yaml"
    params:
        target=link_target("results/{scenario}/{stage}/curves.png"),
    message:
        "results/{wildcards.scenario}/{wildcards.stage}/curves.png is a name for {params.target}"
    shell:
        "ln -sfn {params.target} {output} 2> {log}"
