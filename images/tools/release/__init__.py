"""Make a release of this repository: wheel, sdist, bills of materials, provenance, images.

`make release` runs `python -m release` with images/tools and components on the path.
docs/releases.md says what comes out.

source.py      what is released: a clean checkout, a version, its entry in CHANGELOG.md
commands.py    other programs, and their errors in words
packages.py    wheel and sdist, each built twice
bills.py       bills of materials (CycloneDX) from the locks and from the images
containers.py  images: built, pushed, and what is in them
provenance.py  how everything was made (in-toto statement, SLSA provenance)
signing.py     SHA256SUMS, and signatures by cosign

It needs Python alone; what it builds with is installed from images/tools/requirements.lock.
"""
