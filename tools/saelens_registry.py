"""Write the table of SAELens's registry that ships with endwise, of the `pretrained_saes.yaml` of a sae-lens.

    python tools/saelens_registry.py [PRETRAINED_SAES.yaml]

Without a file it is that of the sae-lens which is installed. The table is read by `formats/registry_of_saelens.py`.
"""

import sys
from pathlib import Path

import yaml

from endwise.formats.registry_of_saelens import TABLE_FILE, installed, table_of, written

if __name__ == "__main__":
    table = table_of(yaml.safe_load(Path(sys.argv[1]).read_bytes())) if sys.argv[1:] else installed()
    if not table:
        sys.exit("sae-lens is not installed here: give the path of its pretrained_saes.yaml.")
    TABLE_FILE.write_bytes(written(table))
    print(f"{sum(len(each['saes']) for each in table.values()):,} SAEs of {len(table)} releases, ", end="")
    print(f"{TABLE_FILE.stat().st_size:,} bytes: {TABLE_FILE}")
