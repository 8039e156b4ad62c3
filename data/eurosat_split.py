"""Write down which pictures of EuroSAT are for the test: `python data/eurosat_split.py`. It needs no picture."""
from __future__ import annotations

import json

from dealkit.datasets.listings import eurosat_split
from dealkit.paths import data_path

NOTE = ("Our own split of EuroSAT (RGB): 24,000 pictures to train, the 3,000 listed here to test. The paper used a "
        "random split of these sizes and did not publish it.")
RULE = "the names Class/Class_N.jpg sorted by the SHA-256 of '0 <name>' (the 0 is the seed); the first 3,000"

if __name__ == "__main__":
    path = data_path("eurosat_split.json", must_exist=False)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in eurosat_split().items())
    path.write_text(f'{{\n "note": {json.dumps(NOTE)},\n "rule": {json.dumps(RULE)},\n "seed": 0,\n'
                    f' "test": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    print(f"{path.name} written")
