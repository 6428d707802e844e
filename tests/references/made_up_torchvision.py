"""A torchvision of names alone, for timm, which imports it for reading images and for other networks than its ViTs."""

import importlib.abc
import importlib.machinery
from types import ModuleType
from typing import Any


class Named(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class MadeUp(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: Any) -> ModuleType:
        return MadeUp(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
