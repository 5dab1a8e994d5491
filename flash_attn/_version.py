"""The version: the flash_attn version whose API this package follows, then its own release. Read by the build, too."""

__version__ = "2.8.3+0.13.0"


def extension_name(torch_version: str) -> str:
    """The compiled extension for a torch. Patches of a minor version share one, as they share their binary interface.

    As the name says which torch it is for, one for another torch is never loaded: that could crash.
    """
    major, minor = torch_version.split(".")[:2]
    return f"_C_torch{major}_{minor}"
