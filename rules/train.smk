for number, stage in enumerate(("sft", "reward", "rlhf"), start=1):
    made = f"store/{stage}/{{name}}"

    rule:
        name:
            stage
        input:
            ancient(parents(made)),
        output:
            directory(made),
        log:
            f"logs/{stage}/{{name}}.log",
        benchmark:
            f"benchmarks/{stage}/{{name}}.tsv"
        conda:
            "../envs/training.yaml"
        threads: run_value(made, "cores")
        resources:
            nodes=run_value(made, "nodes"),
            gpus=run_value(made, "gpus"),
            cpu=run_value(made, "cores_per_node"),
            mem_mb=run_value(made, "mem_mb"),
            shm_mb=run_value(made, "shm_mb"),
            runtime=run_value(made, "runtime"),
        params:
            stage=stage,
            launch=script("launch.py"),
            script=planned_script(made),
            spec=spec(made),
            run=run_options(made),
            processes=run_value(made, "processes"),
            message=describe(made),
        message:
            f"Step {number}: {{params.message}}"
        shell:
            "python {params.launch:q} --processes {params.processes} --gpus {resources.gpus}"
            " --log {log} {params.script:q} --spec {params.spec:q} --run {params.run:q}"
            " --work work/{params.stage}/{wildcards.name}"
            " --board logs/tensorboard/{params.stage}/{wildcards.name} --output {output}"
