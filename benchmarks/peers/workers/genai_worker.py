"""onnxruntime-genai: its model builder, its loop. Llama-like models alone."""

import json
import subprocess
import sys

from protocol import Task, Tell, Write, main


def prepare(task: Task) -> None:
    """Build with the builder's defaults; weights only, computing in int8 where the processor has it, as our graphs do."""
    given = {"-i": task.model, "-o": task.prepared, "-p": task.precision, "-e": "cpu", "-c": task.prepared / "cache"}
    options = [str(part) for pair in given.items() for part in pair]
    built = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *options], check=False)
    if built.returncode:
        sys.exit(built.returncode)


def load(task: Task) -> Write:
    import onnxruntime_genai as genai

    path = task.prepared / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = task.threads
    path.write_text(json.dumps(config), encoding="utf-8")
    model = genai.Model(str(task.prepared))

    def write(new: int, tell: Tell) -> None:
        params = genai.GeneratorParams(model)
        length = len(task.ids) + new
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = genai.Generator(model, params)
        generator.append_tokens(task.ids)
        for _ in range(new):
            generator.generate_next_token()
            tell(generator.get_next_tokens()[0])

    return write


if __name__ == "__main__":
    main(prepare, load, ["onnxruntime-genai", "onnxruntime"])
