"""Published parts of a model: what a configuration says about them, and their weights.

A new run reads the configurations of the folders that `model.image.pretrained` and
`model.decoder.pretrained` name, and stores them in its own. Their weights are bases: checkpoints
name their files, and do not store them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from slam_jax.data.hub_files import CONFIG, FILE, GENERATION, TEMPLATE
from slam_jax.errors import ConfigError, require
from slam_jax.interop.filling import parameter_dtypes, read_parameters
from slam_jax.interop.preprocessing import PREPROCESSING, load_preprocessing
from slam_jax.interop.pretrained import Published, open_pretrained
from slam_jax.interop.vision import open_vision
from slam_jax.language_models import SYSTEMS, make_model
from slam_jax.language_models.base import Transformer
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.training.base import Base, BaseRecord, sha256_of
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import as_json
from slam_jax.vision_models import Preprocessing, VisionTower

DECODER, TOWER = "model.decoder.pretrained", "model.image.pretrained"
# Files beside the weights that say what they mean.
_BESIDE = ("config.json", PREPROCESSING, FILE, CONFIG, GENERATION, TEMPLATE)
_PREFIXES = {DECODER: ("decoder", "language_model"), TOWER: ("streams", "image", "tower")}


def with_pretrained(model: SlamV3Config, known: SlamV3Config | None = None) -> SlamV3Config:
    """The configuration with the fields that are read from the folders of published parts.

    known: that of a checkpoint, whose fields are taken where the folders have the same role; the
    folders are not read then.

    Raises InputError and ConfigError as `load_pretrained` and `load_vision` do.
    """
    decoder, image = model.decoder, model.image
    if decoder.pretrained is not None and decoder.language_model is None:
        if known is not None and known.decoder.language_model is not None:
            fields = {x: getattr(known.decoder, x) for x in ("system", "language_model")}
        else:
            config = open_pretrained(decoder.pretrained).config
            fields = dict(system=_system_of(config), language_model=config)
        decoder = dataclasses.replace(decoder, **fields)
    if image.pretrained is not None and image.tower is None:
        if known is not None and known.image.tower is not None:
            fields = {x: getattr(known.image, x) for x in ("tower", "preprocessing", "size")}
        else:
            tower, how = open_vision(image.pretrained).config, load_preprocessing(image.pretrained)
            how = _resized(how, image.pretrained_size)
            fields = dict(tower=tower, preprocessing=how, size=_side(how, tower.patch_size))
        image = dataclasses.replace(image, **fields)
    return dataclasses.replace(model, decoder=decoder, image=image)


def found_at(model: SlamV3Config, records: Mapping[str, BaseRecord]) -> SlamV3Config:
    """The configuration with the places where the files of a checkpoint's bases are now."""
    for name, record in records.items():
        group = name.split(".")[1]
        if getattr(model, group).pretrained is None:
            continue
        own = dataclasses.replace(getattr(model, group), pretrained=str(path_of(record)))
        model = dataclasses.replace(model, **{group: own})
    return model


def with_groups(config: dict[str, Any], model: SlamV3Config) -> dict[str, Any]:
    """A configuration as JSON with what was read from the folders of published parts."""
    if model.language_model is None and model.tower is None:
        return config
    groups = {name: dataclasses.asdict(getattr(model, name)) for name in ("decoder", "image")}
    return as_json({**config, "model": {**config["model"], **groups}})


def bases_of(
    model: SlamV3Config, known: Mapping[str, BaseRecord] | None = None, *, hashed: bool = True
) -> tuple[Base, ...]:
    """The published parts of a model.

    known: the verified records of a checkpoint by name; only these are wanted then, and their files
    are not hashed again. None = a new run, whose configuration says where they are. hashed: False =
    without the sha256 of their files, for shapes alone.

    Raises InputError where files are missing, or do not fit the configuration.
    """
    bases = []
    parts = {
        DECODER: (model.decoder.pretrained, model.language_model, open_pretrained, make_model),
        TOWER: (model.image.pretrained, model.tower, open_vision, VisionTower),
    }
    for name, (path, config, open_part, make) in parts.items():
        record = None if known is None else known.get(name)
        if record is not None:
            path = path_of(record)
        if config is None or (known is not None and record is None):
            continue
        if path is None:
            raise ConfigError(f"{name} is None; expected where the weights of this model are")
        given = name, path, _PREFIXES[name], config, open_part(path), make, record
        bases.append(base_of(*given, hashed=hashed))
    return tuple(bases)


def base_of(
    name: str,
    path: str | Path,
    prefix: tuple[str, ...],
    config: Any,
    published: Published,
    make: Callable[..., nnx.Module],
    record: BaseRecord | None = None,
    *,
    hashed: bool = True,
) -> Base:
    """The base of one published part, which `make(config, rngs=)` builds below `prefix`.

    record: known already, None = its files are hashed now, if at all.
    """
    if record is None:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        names = {x.file.name for x in published.source.stored.values()}
        names |= {x for x in _BESIDE if Path(path, x).is_file()}
        files = sha256_of(folder, sorted(names)) if hashed else {}
        record = BaseRecord(name, str(folder.resolve()), files, prefix)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))))
    flat: Any = flatten_dict(shapes)
    layout = published.layout_of(flat)
    dtypes = parameter_dtypes(layout, flat, published.source)
    typed = {path: jax.ShapeDtypeStruct(x.shape, dtypes[path]) for path, x in flat.items()}

    def load(wanted: Any) -> Any:
        like = flatten_dict(wanted)
        own = {key: x for key, x in layout.items() if any(path in like for path in x.paths)}
        return unflatten_dict(read_parameters(own, {**typed, **like}, published.source, set(like)))

    return Base(record, by_name(unflatten_dict(typed)), load)


def _system_of(config: Any) -> str:
    """The name of a language model in the registry, which must be able to be a decoder."""
    for name, system in SYSTEMS.items():
        built = isinstance(system.model, type) and issubclass(system.model, Transformer)
        if type(config) is system.config and built:
            return name
    raise ConfigError(f"{DECODER}: a {type(config).__name__} cannot be the decoder")


def path_of(record: BaseRecord) -> Path:
    """The folder, or the GGUF file in it."""
    [*files] = record.files
    alone = len(files) == 1 and files[0].endswith(".gguf")
    return Path(record.path, files[0]) if alone else Path(record.path)


def _side(how: Preprocessing, patch: int) -> int:
    """Pixels a side of a prepared picture."""
    sides = how.crop or how.size
    square = isinstance(sides, tuple) and sides[0] == sides[1]
    require(square, f"{TOWER}: the size of pictures", sides, "a square")
    side: int = sides[0]  # type: ignore[index]
    require(side >= patch, "image.pretrained_size", side, f"at least {patch}, a patch of the tower")
    return side


def _resized(how: Preprocessing, side: int | None) -> Preprocessing:
    """The same preparation for pictures of another size."""
    if side is None:
        return how
    if how.crop is None:
        return dataclasses.replace(how, size=(side, side))
    size = how.size
    if isinstance(size, int):
        size = round(size * side / how.crop[0])
    return dataclasses.replace(how, size=size, crop=(side, side))
