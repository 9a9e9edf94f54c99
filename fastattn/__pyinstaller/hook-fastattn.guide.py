"""The pages of the guide, which are imported by name, and the text that they read."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

hiddenimports = collect_submodules("fastattn.guide")
datas = collect_data_files("fastattn.guide")
