"""What `patch` did: `Report`."""

from dataclasses import dataclass, field

SHOWN = 3  # names of modules on a line


@dataclass
class Report:
    """The modules of a model by what became of them; print it.

    model: the model's class. replaced: kind of module to names. left: class and reason to names. Containers, embeddings
    and linear layers are in neither.
    """

    model: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        numbers = [sum(map(len, group.values())) for group in (self.replaced, self.left)]
        lines = [f"hybrid_ops in {self.model}: {numbers[0]} modules replaced, {numbers[1]} left"]
        for word, group in (("replaced", self.replaced), ("left", self.left)):
            for what, names in group.items():
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {word} {len(names):3} {what}: {', '.join(names[:SHOWN])}{more}")
        return "\n".join(lines)
