"""What a resource config points to: a named volume and a template with a worker's limits; and how all three are made.

Owns the values `NetworkVolume` and `PodTemplate`, and `Immutable`, the shape they share with the configs. Nothing here
touches a disk or talks to the daemon: a volume exists once the daemon has seen a job that wants it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from remoted_client.suggest import (
    bad_value,
    check_amount,
    check_env,
    check_int,
    check_list,
    check_name,
    check_text,
    check_type,
    is_list,
    is_mapping,
    refuse_unknown,
    wrong_type,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from remoted_client.enums import DataCenter

DEFAULT_MOUNT_PATH = "/runpod-volume"
# Mounting over these, or anywhere below the first line, would change the system a worker runs on.
_SYSTEM_FOLDERS = frozenset({
    "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "root", "run", "sbin", "sys", "usr", "var",
})  # fmt: skip
_CROWDED_FOLDERS = frozenset({"home", "media", "opt", "srv", "tmp"})
_PATH_LIMIT = 255


class Immutable:
    """A value that does not change after it was made: compared and hashed by content, safe to share and to pickle.

    Lists and dicts are handed out as copies, so that editing one does not edit the value.
    """

    _inert: frozenset[str] = frozenset()  # fields without effect, which make no two values differ

    def _fill(self, values: Mapping[str, object], shown: Iterable[str]) -> None:
        # Straight into __dict__: pickle and copy restore an instance in the same way, past __setattr__.
        self.__dict__.update(_values=dict(values), _shown=tuple(shown))

    def _content(self) -> dict[str, object]:
        values: dict[str, object] = self.__dict__["_values"]
        return {name: _hashable(value) for name, value in values.items() if name not in self._inert}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Immutable) or type(other) is not type(self):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self._content().items())))

    def __repr__(self) -> str:
        shown: tuple[str, ...] = self.__dict__["_shown"]
        fields = ", ".join(f"{name}={_show(getattr(self, name))}" for name in shown)
        return f"{type(self).__name__}({fields})"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["_values"]})

    # Hidden from type checkers, which would otherwise believe that every name exists and may be set.
    if not TYPE_CHECKING:

        def __getattr__(self, name):
            values = self.__dict__.get("_values", {})  # absent while pickle is still filling the instance
            if name not in values:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}", name=name, obj=self)
            return _thawed(values[name])

        def __setattr__(self, name, value):
            raise AttributeError(self._refusal("set", name))

        def __delattr__(self, name):
            raise AttributeError(self._refusal("delete", name))

        def _refusal(self, verb, name):
            kind = type(self).__name__
            return f"cannot {verb} {name}: a {kind} does not change after it was made; make a new {kind} instead"


class NetworkVolume(Immutable):
    """A folder with a name, kept by the daemon and visible to workers at `mount_path`; private unless shared.

    Example::

        models = NetworkVolume("models", mount_path="/models")
        config = LiveServerless(name="inference", networkVolumeId=models.id)

    `shared_with` names a Unix group. `size`, `dataCenterId` and `datacenter` are accepted and have no effect.
    """

    id: str
    name: str
    mount_path: str
    size: int | float | None
    dataCenterId: DataCenter | str | None
    shared_with: str | None
    _inert = frozenset({"size", "dataCenterId"})

    def __init__(
        self,
        name: str,
        mount_path: str = DEFAULT_MOUNT_PATH,
        *,
        size: float | None = None,
        dataCenterId: DataCenter | str | None = None,
        datacenter: DataCenter | str | None = None,
        shared_with: str | None = None,
        **unknown: NoReturn,
    ) -> None:
        fields = ("name", "mount_path", "size", "dataCenterId", "datacenter", "shared_with")
        refuse_unknown("NetworkVolume", unknown, fields)
        values = {
            "name": check_name("name", name),
            "mount_path": _check_mount_path(mount_path),
            "size": None if size is None else check_amount("size", size),
            "dataCenterId": dataCenterId if dataCenterId is not None else datacenter,
            "shared_with": None if shared_with is None else check_name("shared_with", shared_with),
        }
        values["id"] = _volume_id(name, shared_with)
        shown = [word for word in values if word != "id" and values[word] is not None]
        self._fill(values, shown)
        _volumes[self.id] = self


# So that `networkVolumeId=volume.id` finds the mount path that goes with the id; the latest volume of a name counts.
_volumes: dict[str, NetworkVolume] = {}


def find_volume(volume_id: str) -> NetworkVolume | None:
    """Return the volume made in this process under `volume_id`, or None for one that only the daemon may know."""
    return _volumes.get(volume_id)


class PodTemplate(Immutable):
    """Limits of a worker, the ports it opens in a container, and its image.

    Example: `LiveServerless(name="app", podTemplate=PodTemplate(memory_gb=40, cpu_count=8, expose_ports=["8080"]))`

    `memory_gb` is what a worker and all that it starts may take together, of 2**30 bytes each: a call that takes more ends as
    OOM_RAM. `cpu_count` CPUs are reserved for a worker. Both are of each worker, not of the pool; in a daemon of your own, without
    cgroups, memory is a limit of each process.
    `env` are variables of the workers. `expose_ports` and `ports` are one list in two spellings. `name`, `config` and
    `containerDiskInGb` are accepted and have no effect.
    """

    memory_gb: int | float | None
    cpu_count: int | float | None
    expose_ports: list[int]
    ports: list[int]
    env: dict[str, str | None]
    imageName: str | None

    def __init__(
        self,
        memory_gb: float | None = None,
        cpu_count: float | None = None,
        expose_ports: Sequence[str | int] | str | None = None,
        *,
        env: Mapping[str, str | None] | Sequence[object] | None = None,
        imageName: str | None = None,
        ports: Sequence[str | int] | str | None = None,
        name: str | None = None,
        config: object = None,
        containerDiskInGb: float | None = None,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown("PodTemplate", unknown, _TEMPLATE_FIELDS, _TEMPLATE_REFUSED)
        merged = [*_check_ports("expose_ports", expose_ports), *_check_ports("ports", ports)]
        values: dict[str, object] = {
            "memory_gb": None if memory_gb is None else check_amount("memory_gb", memory_gb),
            "cpu_count": None if cpu_count is None else check_amount("cpu_count", cpu_count),
            "expose_ports": tuple(dict.fromkeys(merged)),
            "env": _check_template_env(env),
            "imageName": check_image(imageName) if imageName else None,
        }
        shown = [word for word, value in values.items() if value]
        self._fill({**values, "ports": values["expose_ports"]}, shown)


def check_volume(volume: object, volume_id: object) -> dict[str, object]:
    """Settle `networkVolume` and `networkVolumeId`, of which a config may give one."""
    if volume is not None and volume_id is not None:
        raise ValueError("cannot set networkVolumeId: networkVolume is set as well; keep one of them")
    if volume is not None:
        known = check_type("networkVolume", volume, NetworkVolume, "a NetworkVolume")
        return {"networkVolume": known, "networkVolumeId": known.id}
    if volume_id is None:
        return {"networkVolume": None, "networkVolumeId": None}
    text = check_text("networkVolumeId", volume_id, "the id of a NetworkVolume: a str such as volume.id")
    return {"networkVolume": find_volume(text), "networkVolumeId": text}


def check_template(first: object, second: object) -> PodTemplate | None:
    """Return the template given as `podTemplate`, as `template`, or as both if they are equal."""
    given = {"podTemplate": first, "template": second}
    found = [
        check_type(field, value, PodTemplate, "a PodTemplate") for field, value in given.items() if value is not None
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("cannot set template: podTemplate is set to another one; keep one of them")
    return found[0] if found else None


def check_container(image: object, isolation: object, template: PodTemplate | None) -> dict[str, object]:
    """Settle `imageName` and `isolation`. An image alone means a container: outside of it is not what was asked for."""
    inherited = template.imageName if template else None
    name = inherited if image in (None, "") else check_image(image)
    allowed = "'subprocess' or 'docker'"
    kind = ("docker" if name else "subprocess") if isolation is None else isolation
    if check_type("isolation", kind, str, allowed) not in ("subprocess", "docker"):
        raise bad_value("isolation", kind, allowed)
    if name and kind == "subprocess":
        raise ValueError("cannot set imageName: isolation is 'subprocess'; write isolation='docker', or drop the image")
    return {"imageName": name, "isolation": kind}


def check_image(value: object) -> str:
    """Return the name of a container image."""
    return check_text("imageName", value, "the name of an image, such as 'python:3.11'")


_TEMPLATE_FIELDS = (
    "memory_gb", "cpu_count", "expose_ports", "env", "imageName", "ports", "name", "config", "containerDiskInGb",
)  # fmt: skip
# Free arguments to the container engine are root on the host, for whoever may write them.
_TEMPLATE_REFUSED = {
    "dockerArgs": "arguments to the container engine would give root on this host; use memory_gb, cpu_count and ports",
    "startScript": "a worker starts one way for everybody; do it in the function, or in an image of your own",
    "advancedStart": "a worker starts one way for everybody; do it in the function, or in an image of your own",
    "containerRegistryAuthId": "there is no such account here; run `docker login` once on this machine",
}


def _check_ports(field: str, value: object) -> list[int]:
    if value is None:
        return []
    parts = check_list(field, value, "a list of ports, such as ['8080', '9090/http']")
    return [_check_port(field, part) for part in parts for part in _split(part)]


def _split(part: object) -> list[object]:
    return list(part.split(",")) if isinstance(part, str) else [part]


def _check_port(field: str, value: object) -> int:
    if not isinstance(value, str):
        return check_int(field, value, 1, 65535)
    number = value.strip().partition("/")[0]
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and 0 < int(number) <= 65535):
        raise bad_value(field, value, "ports from 1 to 65535, such as '8080' or '8080/http'")
    return int(number)


def _check_template_env(value: object) -> dict[str, str | None]:
    """Take a dict, or the SDK's list of pairs with a `key` and a `value`."""
    if value is None or is_mapping(value):
        return check_env("env", value or {})
    allowed = "a dict, or a list of {'key': ..., 'value': ...}"
    return check_env("env", dict(_pair(pair, allowed) for pair in check_list("env", value, allowed)))


def _pair(pair: object, allowed: str) -> tuple[object, object]:
    if is_mapping(pair) and set(pair) == {"key", "value"}:
        return pair["key"], pair["value"]
    missing = object()
    key, value = getattr(pair, "key", missing), getattr(pair, "value", missing)
    if key is missing or value is missing:
        raise wrong_type("env", pair, allowed)
    return key, value


def _check_mount_path(value: object) -> str:
    allowed = "an absolute path such as '/models', without '..', ':' and ',', outside the system's own folders"
    path = check_type("mount_path", value, str, f"a str: {allowed}")
    path = path[:-1] if path.endswith("/") else path
    root, *parts = path.split("/")
    whole = not root and parts and path.isprintable() and len(path) <= _PATH_LIMIT
    if not whole or ":" in path or "," in path or any(part in ("", ".", "..") for part in parts):
        raise bad_value("mount_path", value, allowed)
    if parts[0] in _SYSTEM_FOLDERS or (parts[0] in _CROWDED_FOLDERS and len(parts) == 1):
        raise bad_value("mount_path", value, allowed)
    return path


def _volume_id(name: str, group: str | None) -> str:
    """Name the same folder in every process: the private one of `name`, or the one that `group` shares."""
    from hashlib import sha256

    safe = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    digest = sha256("\0".join((name, group or "")).encode()).hexdigest()
    return f"vol-{safe[:32]}-{digest[:12]}"


def _hashable(value: object) -> object:
    return frozenset(value.items()) if is_mapping(value) else value


def _thawed(value: object) -> object:
    if is_mapping(value):
        return dict(value)
    return list(value) if is_list(value) else value


def _show(value: object) -> str:
    if is_mapping(value):  # an environment: its values may be secrets
        return "{" + ", ".join(f"{name!r}: ..." for name in value) + "}"
    if is_list(value):
        return "[" + ", ".join(map(_show, value)) + "]"
    return f"{type(value).__name__}.{value.name}" if isinstance(value, Enum) else repr(value)
