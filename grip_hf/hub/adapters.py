"""What a patched model writes beside the adapters that are saved around it, and says of those that are loaded.

PEFT saves and loads them without asking the model around which they are put, but for its weights: hooks there are what
stands. Beside the adapter's own files lies the GRIP part; and `adapter_config.json` tells of it twice: in a field that
PEFT keeps, and under a name that PEFT does not know, so that it warns on loading, whether or not the model is patched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..engine.callers import DEFAULT_ADAPTER, active_adapters, loading_adapter, saving_adapters
from ..engine.methods import InstanceMethod
from ..files import write_text
from .adapter_part import (
    ADAPTER_FILE,
    KEPT_BY_PEFT,
    OURS,
    PLACES,
    AdapterPart,
    facts_of,
    part_named,
    read_part,
    stored,
    warn,
    warn_if_it_differs,
)
from .download import SUBFOLDER

# PEFT prints the names that it does not know; this one is for people.
ALOUD = "trained_on_pruned_visual_tokens_so_call_grip_hf_apply_grip"


class AdapterFiles:
    """Writes the GRIP part beside the adapters of a patched model, and compares it with that of those it is given.

    Args:
        handle: The `GripHandle` of the model.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.registered: list[Any] = []
        self.marks: list[Mark] = []
        self.compared: list[Any] = []  # PEFT's configurations of the adapters that were

    def attach(self) -> None:
        """Register the hooks."""
        owner = self.handle.owner
        self.registered = [
            owner.register_state_dict_pre_hook(self.save),
            owner.register_load_state_dict_pre_hook(self.compare_loaded),
        ]
        if hasattr(type(owner), "load_adapter"):
            method = LoadAdapter(self)
            method.attach()
            self.registered.append(method)
        self.handle._boundary.before_choice = self.compare_active

    def remove(self) -> None:
        """Leave the model as it was, and PEFT's configurations too."""
        for one in [*self.registered, *self.marks]:
            one.remove()
        self.registered, self.marks = [], []
        self.handle._boundary.before_choice = None

    def save(self, module: Any, prefix: str, keep_vars: bool) -> None:
        """Write the part, if adapters are being saved."""
        for folder, config in saving_adapters(module):
            if self.handle.save_part(os.path.join(folder, SUBFOLDER)):
                self.marks.append(Mark(config, folder, type(module), facts_of(self.handle)))

    def compare_loaded(self, module: Any, *_: Any) -> None:
        """Warn, if PEFT is loading an adapter that was trained otherwise."""
        loaded = loading_adapter(module)
        if loaded is not None:
            self.compare(*loaded)

    def compare(self, name: str, config: Any, source: str, hub: dict[str, Any]) -> None:
        """Remember where an adapter was loaded from; warn if it was trained otherwise.

        Args:
            name: The adapter.
            config: PEFT's configuration of it.
            source: Its folder or Hub id.
            hub: Where on the Hub to look.
        """
        part = read_part(name, config, stored(source, hub), (source, hub))
        self.handle.adapters.pop(name, None)
        if part is None:
            warn(f"the adapter {name!r} was trained without pruning, and this model is pruned")
            return
        self.handle.adapters[name] = part
        self.compare_part(part)

    def compare_active(self) -> None:
        """Warn of adapters that came to be active behind the patch's back; once of each."""
        for name, config in active_adapters(self.handle.owner).items():
            if any(config is one for one in self.compared):
                continue
            part = part_named(name, config, self.handle.adapters)
            if part is None:  # new, or trained without pruning: files would tell, and are not known
                self.compared.append(config)
            else:
                self.compare_part(part)

    def compare_part(self, part: AdapterPart) -> None:
        """Warn if an adapter was trained otherwise; only now."""
        self.compared.append(part.config)
        warn_if_it_differs(part, self.handle)


class LoadAdapter(InstanceMethod):
    """`load_adapter` of a patched transformers model, whose weights come by no `load_state_dict`.

    Args:
        files: What compares adapters with the patch.
    """

    def __init__(self, files: AdapterFiles) -> None:
        super().__init__(files.handle.owner, "load_adapter")
        self.files = files

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load it as the model itself does, then compare it."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        result = self.own(*args, **kwargs)
        source = given.get("peft_model_id")
        if source is not None and given.get("peft_config") is None:
            name = given.get("adapter_name") or DEFAULT_ADAPTER
            hub = {**given, **given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
            hub = {one: hub[one] for one in (*PLACES, "subfolder") if hub.get(one) is not None}
            model: Any = self.module
            self.files.compare(name, model.peft_config[name], os.fspath(source), hub)
        return result


def tell(folder: str, base: type, facts: dict[str, Any] | None) -> None:
    """Add to the `adapter_config.json` in a folder what the patch has to tell.

    Args:
        folder: Where it lies.
        base: The class of the patched model.
        facts: What is to be told.
    """
    path = Path(folder, ADAPTER_FILE)
    told = json.loads(path.read_text(encoding="utf-8"))
    auto = {"base_model_class": base.__name__, "parent_library": base.__module__}
    told[KEPT_BY_PEFT] = {**auto, **(told.get(KEPT_BY_PEFT) or {}), OURS: facts}
    told[ALOUD] = "The settings and the scorer lie in the folder `grip` beside this file."
    write_text(path, json.dumps(told, indent=2, sort_keys=True))


class Mark:
    """Stands in for `save_pretrained` of a PEFT configuration once, so that its file tells of the patch.

    PEFT writes that file after it has collected the weights, which is when the patch hears of it.

    Args:
        config: PEFT's configuration.
        folder: Where it is about to be saved.
        base: The class of the patched model.
        facts: What is to be told.
    """

    def __init__(self, config: Any, folder: str, base: type, facts: dict[str, Any] | None) -> None:
        self.config, self.folder, self.base, self.facts = config, folder, base, facts
        config.save_pretrained = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        copied = object.__new__(Mark)
        copied.__dict__.update(vars(self), config=memo.get(id(self.config), self.config))
        return copied

    def __call__(self, save_directory: str, **kwargs: Any) -> None:
        """Save as the configuration does, and where it was to be saved, add what the patch has to tell."""
        type(self.config).save_pretrained(self.config, save_directory, **kwargs)
        if os.path.abspath(save_directory) != os.path.abspath(self.folder):
            return
        self.remove()
        tell(save_directory, self.base, self.facts)

    def remove(self) -> None:
        """Leave the configuration as it was."""
        if vars(self.config).get("save_pretrained") is self:
            del self.config.save_pretrained
