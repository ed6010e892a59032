"""Attention backends. Each module holds one; they are listed in taylor_patch/plugins.py like any third party's."""
