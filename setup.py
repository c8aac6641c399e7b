"""What pyproject.toml cannot say: a wheel carries configs/, which lies at the top of a checkout."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")
SHIPPED = ("*.yaml", "tasks/*.yaml")
"""Configurations of commands; those of clusters need a checkout."""


class BuildWithConfigs(build_py):
    """Puts the configurations into the wheel as engine/_configs, where engine.core.cli looks last."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own are found
            return
        for pattern in SHIPPED:
            for file in sorted(CONFIGS.glob(pattern)):
                target = Path(self.build_lib, "engine", "_configs", file.relative_to(CONFIGS))
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
