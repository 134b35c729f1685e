"""Wall time and peak memory of the ONNX export alone, and how they grow with the number of layers.

python benchmarks/export_cost.py QUANT_FOLDER [--layers 30 60 120]
QUANT_FOLDER is OUT/quant of a finished export. More layers than the model has repeat its layers.
Writes benchmarks/results/export-cost-<date>.json and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, resource, sys, tempfile, time
from pathlib import Path
began = time.monotonic()
from calibration.quant.folder import QuantModel, read_quant
from exporter.graph.decoder import export_onnx

class Repeated(QuantModel):
    def groups(self, layer):
        prefix = self.family.layer(layer % self.own)
        target = self.family.layer(layer)
        return [self.fused([f"{prefix}.{m.name}" for m in g.members], f"{target}.{g.node}") for g in self.family.groups]
    def tensor(self, name):
        parts = name.split(".")
        if parts[1] == "layers" and name not in self._entries:
            parts[2] = str(int(parts[2]) % self.own)
        return super().tensor(".".join(parts))

quant = Repeated(Path(sys.argv[1]))
quant.own = quant.config["num_hidden_layers"]
quant.config = {**quant.config, "num_hidden_layers": int(sys.argv[2])}
with tempfile.TemporaryDirectory() as folder:
    export_onnx(quant, Path(folder))
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
print(json.dumps({"seconds": round(time.monotonic() - began, 2), "bytes": size,
                  "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "torch": "torch" in sys.modules}))
"""


def main() -> None:
    """Measure each layer count in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quant", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 60, 120])
    args = parser.parse_args()
    rows = {}
    for layers in args.layers:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(args.quant), str(layers)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows[layers] = row = json.loads(done.stdout)
        print(
            f"{layers:4d} layers  {row['seconds']:6.2f} s  peak {row['peak_rss'] / 1e6:6.0f} MB "
            f" written {row['bytes'] / 1e6:7.1f} MB"
        )
    date = datetime.date.today().isoformat()
    path = Path(__file__).parent / "results" / f"export-cost-{date}.json"
    path.write_text(json.dumps({"date": date, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
