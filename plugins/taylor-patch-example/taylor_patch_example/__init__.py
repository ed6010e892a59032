"""A whole plugin for taylor_patch: this file says what there is, chunked.py is it. Listing plugins imports this file only, not torch."""

import taylor_patch


# The entry point in pyproject.toml names this class.
class Plugin:
    taylor_patch_api = 1  # the plugin API that this is written for

    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends() -> list[taylor_patch.LazyBackend]:
        return [taylor_patch.LazyBackend("chunked", "taylor_patch_example.chunked:Chunked", "exact attention, 1024 query rows at a time")]
