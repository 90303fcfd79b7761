"""What each adapter name meant when, as far as a client of a server under churn can tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.serving.churn_adapters import Content


@dataclass
class Spell:
    """A time in which a name may have had a content (None: in which it may have been unknown)."""

    content: Content | None
    since: float
    until: float = float("inf")


@dataclass
class History:
    """Spells of each name, in their order; they overlap while a call that changes the name is under way."""

    spells: dict[str, list[Spell]] = field(default_factory=dict)

    def now(self) -> dict[str, Content]:
        """The content of each name that is known."""
        return {name: s[-1].content for name, s in self.spells.items() if s[-1].content is not None}

    def change(self, name: str, content: Content | None, called: float, answered: float) -> None:
        """A call gave `name` another content; None: made it unknown."""
        spells = self.spells.setdefault(name, [Spell(None, 0.0)])
        if spells[-1].content == content:
            return
        spells[-1].until = answered
        spells.append(Spell(content, called))

    def possible(self, name: str, sent: float, answered: float) -> list[Content | None]:
        """What a request may have been answered with."""
        return [s.content for s in self.spells[name] if s.since <= answered and s.until >= sent]
