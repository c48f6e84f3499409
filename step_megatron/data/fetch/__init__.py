"""Download the pinned open data and weights: `fetch(data_dir, groups)`.

deb.py       Debian packages in pure Python
wheel.py     wheels through the user's pip
mirror.py    which Debian mirror
download.py  resumable, checked downloads
catalogue.py sources.yaml: names, versions, sizes, digests, licences, groups
install.py   archives -> the data directory
"""

from step_megatron.data.fetch.install import fetch

__all__ = ["fetch"]
