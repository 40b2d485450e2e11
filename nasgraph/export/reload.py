"""Run in a process of its own, as a script: load exported files where nasgraph cannot be imported, and run them.

The job is a JSON file: ``threads``, ``results`` (a folder), and ``files``, each with ``id``, ``path``, ``reload``
(a Python file that defines ``load``) and ``inputs`` (safetensors files, tensors named 0, 1, ...). For each file, the
results folder receives ``<id>.started``, then ``<id>.<n>.safetensors`` for the n-th inputs, then ``<id>.json``.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path


class _Blocked:
    """An importer that refuses nasgraph, installed or not."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.partition(".")[0] == "nasgraph":
            raise ModuleNotFoundError("nasgraph is blocked: an exported model must load without it", name=name)
        return None


def module(path: str, name: str):  # type: ignore[no-untyped-def]
    """The Python file at ``path``, imported under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def main(job_file: str) -> None:
    sys.meta_path.insert(0, _Blocked())
    warnings.simplefilter("ignore")
    import torch
    from safetensors.torch import load_file, save_file

    job = json.loads(Path(job_file).read_text())
    results = Path(job["results"])
    torch.set_num_threads(job["threads"])
    for file in job["files"]:
        (results / f"{file['id']}.started").touch()
        try:
            loaded = module(file["reload"], f"reload{file['id']}").load(file["path"])
            for number, given in enumerate(file["inputs"]):
                # cloned: the bits of a product may depend on how memory is aligned, and mapped files are not
                inputs = [tensor.clone() for _, tensor in sorted(load_file(given).items(), key=lambda i: int(i[0]))]
                with torch.no_grad():
                    result = loaded(*inputs) if callable(loaded) else loaded
                tensors = result if isinstance(result, dict) else {"output": torch.as_tensor(result)}
                tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
                save_file(tensors, results / f"{file['id']}.{number}.safetensors")
                if isinstance(result, dict):
                    break
            answer: dict[str, str | None] = {"error": None}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        partial = results / f"{file['id']}.partial"
        partial.write_text(json.dumps(answer))
        partial.replace(results / f"{file['id']}.json")


if __name__ == "__main__":
    main(sys.argv[1])
