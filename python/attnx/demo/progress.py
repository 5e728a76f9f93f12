"""The bars shown while a run works."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from attnx.demo.training import Learner


class DemoProgress(Progress):
    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=console,
        )

    def add(self, description: str, total: int) -> TaskID:
        return self.add_task(description, total=total, status="")

    def show_step(self, task: TaskID, learner: Learner, tokens: int) -> None:
        recent_losses, recent_seconds = learner.losses[-10:], learner.seconds[-10:]
        loss = sum(recent_losses) / len(recent_losses)
        speed = tokens * len(recent_seconds) / sum(recent_seconds)
        self.update(task, advance=1, status=f"{loss:.3f} bits/byte  {speed:,.0f} tokens/s")
