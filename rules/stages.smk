# What runs on GPUs or processes as its `run` says: the three stages, and the comparison.
for stage in (*STAGES, "eval"):
    planned = Planned(f"store/{stage}/{{name}}")

    rule:
        name:
            stage
        input:
            ancient(planned.parents),
        output:
            directory(planned.path),
        log:
            f"logs/{stage}/{{name}}.log",
        benchmark:
            f"benchmarks/{stage}/{{name}}.tsv"
        conda:
            "../envs/training.yaml"
        threads: planned.run_value("cores")
        resources:
            nodes=planned.run_value("nodes"),
            gpus=planned.run_value("gpus"),
            # Of a pod: Snakemake cuts `threads` to what its own machine has.
            cpu=planned.run_value("cores_per_node"),
            mem_mb=planned.run_value("mem_mb"),
            shm_mb=planned.run_value("shm_mb"),
            runtime=planned.run_value("runtime"),
        params:
            stage=stage,
            launch=script("launch.py"),
            script=planned.script,
            spec=planned.spec,
            run=planned.run,
            processes=planned.run_value("processes"),
            message=planned.message,
        message:
            "{params.message}"
        shell:
            "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
            " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
            " --work work/{params.stage}/{wildcards.name}"
            " --board logs/tensorboard/{params.stage}/{wildcards.name} --output {output}"
