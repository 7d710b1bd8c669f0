rule eval:
    input:
        ancient(parents("store/eval/{name}")),
    output:
        directory("store/eval/{name}"),
    log:
        "logs/eval/{name}.log",
    benchmark:
        "benchmarks/eval/{name}.tsv"
    threads: run_value("store/eval/{name}", "threads")
    resources:
        mem_mb=run_value("store/eval/{name}", "mem_mb"),
        runtime=run_value("store/eval/{name}", "runtime"),
    params:
        spec=spec("store/eval/{name}"),
        run=run_options("store/eval/{name}"),
        processes=run_value("store/eval/{name}", "processes"),
        message=describe("store/eval/{name}"),
    message:
        "Comparison: {params.message}"
    shell:
        "{LAUNCH} --processes {params.processes} --log {log}"
        " {SCRIPTS}/compare_replies.py --spec {params.spec:q} --run {params.run:q}"
        " --output {output}"


rule link:
    input:
        ancient(link_source),
    output:
        directory("results/{result}"),
    log:
        "logs/results/{result}.log",
    benchmark:
        "benchmarks/results/{result}.tsv"
    params:
        target=link_target,
    message:
        "results/{wildcards.result} is a name for {params.target}"
    shell:
        "ln -sfn {params.target} {output} 2> {log}"
