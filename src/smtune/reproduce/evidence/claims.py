"""The paper's claims and what others doubt, each with how it is tested here, or why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smtune.report.benchmarks import claims as cost_claims
from smtune.reproduce.evidence.judges import (
    BEST,
    NOT_RUN,
    NOT_TESTABLE,
    Better,
    Counted,
    Evidence,
    Judged,
    Places,
    Test,
    Timed,
    Trend,
)

SMALL, LARGE, OF_890 = 0.0084, 0.0491, 0.0086


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        source, text: where it stands, and what it says.
        published: the figures that it comes with.
        tests: how it is tested here; all that have their cells are shown.
        why_not: in place of them, why it cannot be.
        points, family: the difference on LLaMA-7B that an experiment at that size would have to tell, and its task.
    """

    source: str
    text: str
    published: str = ""
    tests: tuple[Test, ...] = ()
    why_not: str = ""
    points: float | None = None
    family: str = ""

    def judge(self, evidence: Evidence) -> list[Judged]:
        """What came of it, at least one line; of a claim that has not been tested, what would do it."""
        if self.why_not:
            return [Judged("", self.why_not, NOT_TESTABLE)]
        found = [judged for test in self.tests for judged in test.judge(evidence)]
        return found or [Judged("; ".join(dict.fromkeys(test.command for test in self.tests)), "", NOT_RUN)]


LORA, FULL = "LoRA on q, k, v", "Full fine-tuning"
SHARES = (
    ("MLP 100 %, attention 0 %", 0.0),
    ("MLP 50 %, attention 50 %", 0.5),
    ("MLP 25 %, attention 75 %", 0.75),
    ("MLP 0 %, attention 100 %", 1.0),
)
SHARES_OF_STUDY = (
    ("gate, up, down", 0.0),
    ("MLP 50 %, attention 50 %", 0.5),
    ("MLP 25 %, attention 75 %", 0.75),
    ("q, k, v", 1.0),
)
GPU = "needs the paper's models and GPUs, which there are not here"


def _trends(label: str, study_label: str | None = None, **fields: Any) -> tuple[Trend, ...]:
    """On both tasks; the study's rows may have another label."""
    study = {**fields, "than": LORA if fields.get("than") == "LoRA" else fields.get("than", "")}
    return (
        Trend("table3", "choice", label, **fields),
        Trend("study-budgets", "math", study_label or label, **study),
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "abstract, §4.2, Table 2",
        "SMT surpasses LoRA of as many parameters on commonsense reasoning",
        "+2.4, +1.9, +4.2, +6.0 points (LLaMA-7B, 13B, LLaMA2-7B, LLaMA3-8B)",
        (Better("table2", "SMT", "LoRA", "choice", claimed=0.019),),
        points=0.024,
        family="choice",
    ),
    Claim(
        "abstract, §4.2, Table 2",
        "SMT surpasses DoRA of as many parameters on commonsense reasoning",
        "+0.3, +0.9, +1.3, +1.6 points",
        (Better("table2", "SMT", "DoRA", "choice", claimed=0.003),),
        points=0.003,
        family="choice",
    ),
    Claim(
        "§4.4, Table 5",
        "SMT surpasses LoRA of as many parameters on arithmetic",
        "+1.3 points (LLaMA-7B)",
        (
            Better("study-methods", "SMT", LORA, "math", claimed=0.013),
            Better("table5", "SMT", "LoRA", "math", claimed=0.013),
        ),
        points=0.013,
        family="math",
    ),
    Claim(
        "§4.4, Table 5",
        "SMT surpasses DoRA of as many parameters on arithmetic",
        "+1.1 points (LLaMA-7B)",
        (
            Better("study-methods", "SMT", "DoRA", "math", claimed=0.011),
            Better("table5", "SMT", "DoRA", "math", claimed=0.011),
        ),
        points=0.011,
        family="math",
    ),
    Claim(
        "§4.2, Table 2",
        "SMT at 4.91 % surpasses DoRA at its best size",
        "+3.0, +2.8, +2.9, +2.0 points",
        (
            Better("table3", "SMT", "DoRA", "choice", budget=LARGE, second_budget=BEST),
            Better("study-budgets", "SMT", "DoRA", "math", budget=LARGE, second_budget=BEST),
        ),
        points=0.030,
        family="choice",
    ),
    Claim(
        "§4.3, Table 3",
        "SMT at 4.91 % surpasses DoRA at 4.91 %",
        "+3.8, +4.9 points (LLaMA-7B, LLaMA2-7B)",
        (
            Better("table3", "SMT", "DoRA", "choice", budget=LARGE, second_budget=LARGE),
            Better("study-budgets", "SMT", "DoRA", "math", budget=LARGE, second_budget=LARGE),
        ),
        points=0.038,
        family="choice",
    ),
    Claim(
        "§4.3, Table 3, Figure 3",
        "SMT goes on improving with more parameters",
        "77.3 to 81.4 from 0.43 to 4.91 % (LLaMA-7B)",
        _trends("SMT"),
    ),
    Claim(
        "abstract, §4.3, Table 3",
        "LoRA stays or declines with more parameters",
        "76.3 to 74.7 from 0.84 to 4.91 %",
        _trends("LoRA", LORA, rises=False, from_budget=SMALL),
    ),
    Claim(
        "abstract, §4.3, Table 3",
        "DoRA stays or declines with more parameters",
        "78.4 to 77.6 from 0.84 to 4.91 %",
        _trends("DoRA", rises=False, from_budget=SMALL),
    ),
    Claim("§4.3, Figure 3", "SMT gains more from parameters than LoRA does", "", _trends("SMT", than="LoRA")),
    Claim("§4.3, Figure 3", "SMT gains more from parameters than DoRA does", "", _trends("SMT", than="DoRA")),
    Claim(
        "§1, §4.2, Table 2",
        "SMT at 4.91 % closes the gap to full fine-tuning",
        "81.4 and 81.4, 83.4 and 82.2 (LLaMA-7B, LLaMA2-7B)",
        (
            Better("table2", "SMT (larger)", FULL, "choice", as_good=True, gap_from=("table2", "LoRA")),
            Better(
                "study-budgets",
                "SMT",
                FULL,
                "math",
                budget=LARGE,
                second_experiment="study-control",
                as_good=True,
                gap_from=("study-methods", LORA),
            ),
        ),
    ),
    Claim(
        "§4.2, Table 2",
        "SMT at 0.84 % closes the gap to full fine-tuning",
        "78.7 and 81.4, 81.8 and 82.2",
        (
            Better("study-methods", "SMT", FULL, "choice", as_good=True, gap_from=("study-methods", LORA)),
            Better("study-methods", "SMT", FULL, "math", as_good=True, gap_from=("study-methods", LORA)),
        ),
    ),
    Claim(
        "§5.1, Table 4",
        "Blocks in attention do better than blocks in MLPs",
        "+2.0 points (LLaMA-7B)",
        (
            Better("table4", "MLP 0 %, attention 100 %", "MLP 100 %, attention 0 %", "choice"),
            Better("study-places", "q, k, v", "gate, up, down", "math"),
        ),
        points=0.020,
        family="choice",
    ),
    Claim(
        "§5.1, Table 4",
        "The more of the blocks in attention, the better",
        "76.7, 77.3, 77.8, 78.7",
        (
            Trend("table4", "choice", points=SHARES, per="whole share"),
            Trend("study-places", "math", points=SHARES_OF_STUDY, per="whole share"),
        ),
    ),
    Claim(
        "§5.2, Table 6",
        "Blocks in V do better than blocks in K",
        "+4.6 points (LLaMA-7B)",
        (Better("table6", "V SMT", "K SMT", "choice"), Better("study-places", "v alone", "k alone", "math")),
        points=0.046,
        family="choice",
    ),
    Claim(
        "§5.2, Table 6",
        "Blocks in V do better than blocks in Q",
        "+3.2 points as printed; the row's mean is 74.2, not 75.3",
        (Better("table6", "V SMT", "Q SMT", "choice"), Better("study-places", "v alone", "q alone", "math")),
        points=0.032,
        family="choice",
    ),
    Claim(
        "§5.2, Table 6",
        "SMT's choice among Q, K and V is as good as V alone",
        "+0.2 points",
        (
            Better("table6", "QKV SMT", "V SMT", "choice", as_good=True),
            Better("study-places", "q, k, v", "v alone", "math", as_good=True),
        ),
    ),
    Claim(
        "§5.2, Figure 5",
        "Most of the chosen blocks are V's",
        "95.17 %",
        (
            Places("figure4", "SMT", "choice", share_of="v"),
            Places("study-methods", "SMT", "choice", share_of="v"),
            Places("study-methods", "SMT", "math", share_of="v"),
        ),
    ),
    Claim(
        "§5.2, Figure 4",
        "Every V matrix has blocks, and most Q and K matrices have none",
        "22 of 32 Q, 21 of 32 K, 0 of 32 V frozen",
        (
            Places("figure4", "SMT", "choice", frozen="v"),
            Places("study-methods", "SMT", "choice", frozen="v"),
            Places("study-methods", "SMT", "math", frozen="v"),
        ),
    ),
    Claim(
        "§3.1, appendix B",
        "Blocks of large gradient are the ones to train: they do better than random blocks",
        "not compared",
        (
            Better("study-criteria", "SMT, abs_of_sum", "control: random blocks", "math"),
            Better("table2", "SMT", "control: random blocks", "choice"),
        ),
    ),
    Claim(
        "abstract",
        "67 % less memory than full fine-tuning",
        "−67 %",
        (Counted("llama-7b", "SMT", SMALL, 0.67, FULL), Timed(cost_claims.CUT)),
    ),
    Claim("§3.1", "LLaMA-7B is fine-tuned in less than 20 GB", "< 20 GB", (Counted("llama-7b", "SMT", SMALL, 20e9),)),
    Claim(
        "§1",
        "Full fine-tuning of LLaMA-7B needs at least 58 GB",
        "58 GB",
        (Counted("llama-7b", FULL, 1.0, 58e9, needs_more=True),),
    ),
    Claim(
        "§3.3",
        "LLaMA-13B at 1 % takes about 250 MB less than with LoRA",
        "250 MB",
        (Counted("llama-13b", "SMT", 0.01, 0.2e9, "LoRA", 0.01, is_share=False),),
    ),
    Claim(
        "§3.3",
        "Less memory than LoRA of as many parameters",
        "",
        (Counted("llama-7b", "SMT", SMALL, 1.0, "LoRA", SMALL, is_share=False), Timed(cost_claims.LOWER)),
    ),
    Claim(
        "§3.3",
        "Less memory than DoRA of as many parameters",
        "",
        (Counted("llama-7b", "SMT", SMALL, 1.0, "DoRA", SMALL, is_share=False),),
    ),
    Claim(
        "§4.2",
        "99.5 % of the optimizer's memory is saved with less than 5 % trained",
        "−99.5 %",
        tuple(Counted("llama-7b", "SMT", budget, 0.995, FULL, part="optimizer") for budget in (0.0043, SMALL, LARGE)),
    ),
    Claim("§3.1", "The gradients' memory is cut to 0.5 %", "0.5 %", (Timed(cost_claims.GRADIENTS),)),
    Claim("§3.1", "The activations' memory is cut to 0.5 %", "0.5 %", (Timed(cost_claims.ACTIVATIONS),)),
    Claim("§3.1", "The weight gradients' computation is cut to 0.5 %", "0.5 %", (Timed(cost_claims.WEIGHTS),)),
    Claim("§3.1", "The optimizer step's computation is cut to 0.5 %", "0.5 %", (Timed(cost_claims.STEP),)),
    Claim(
        "§3.3, Table 1",
        "14.6 times as fast as full fine-tuning, and faster than LoRA and DoRA",
        "14.6×, 1.07×, 1.08×",
        (Timed(cost_claims.SPEED),),
    ),
    Claim(
        "§3.3",
        "LoRA's forward does more work, SMT's does not",
        "",
        (Timed(cost_claims.FORWARD),),
    ),
    Claim("§4.2", "SMT outstrips ChatGPT-3.5-turbo", "77.0", why_not="no such model can be run here"),
    Claim("§4.2 to §5.2", "The accuracies themselves on LLaMA-7B, 13B, LLaMA2-7B and LLaMA3-8B", "", why_not=GPU),
    Claim("§3.1", "Fine-tuning LLaMA-7B fits into an RTX 3090 of 24 GB", "", why_not=GPU),
)

_RANDOM, _SHUFFLED = "control: random blocks", "control: SMT's counts, random places"
DOUBTS: tuple[Claim, ...] = (
    Claim(
        "random masks",
        "Random blocks do as well, at a learning rate of their own",
        tests=(
            Better("study-criteria", _RANDOM, "SMT, abs_of_sum", "math", as_good=True),
            Better("table2", _RANDOM, "SMT", "choice", as_good=True),
        ),
    ),
    Claim(
        "random masks",
        "As many blocks in every matrix at random places do as well",
        tests=(
            Better("study-criteria", _SHUFFLED, "SMT, abs_of_sum", "math", as_good=True),
            Better("table5", _SHUFFLED, "SMT", "math", budget=OF_890, second_budget=OF_890, as_good=True),
            Better("table2", _SHUFFLED, "SMT", "choice", as_good=True),
        ),
    ),
    Claim(
        "LoRA everywhere",
        "LoRA on all linear layers, tuned, does better than SMT",
        tests=(
            Better("study-methods", "LoRA on all linear layers", "SMT", "math"),
            Better("table5", "LoRA, all linear layers", "SMT", "math", budget=OF_890, second_budget=OF_890),
            Better("study-methods", "LoRA on all linear layers", "SMT", "choice"),
        ),
    ),
    Claim(
        "the released code",
        "Its criterion (net) does as well as the paper's",
        tests=(
            Better("study-criteria", "SMT, net", "SMT, abs_of_sum", "math", as_good=True),
            Better("study-criteria", "SMT, net", "SMT, abs_of_sum", "choice", as_good=True),
        ),
    ),
    Claim(
        "the released code",
        "Its dense warm-up, kept, is what helps",
        tests=(
            Better("study-warmup", "dense warm-up, kept, 20 steps fewer afterwards", "SMT", "math"),
            Better(
                "study-warmup",
                "dense warm-up, kept, SMT's counts at random places",
                "dense warm-up, kept",
                "math",
                as_good=True,
            ),
        ),
    ),
    Claim(
        "dense v",
        "Training v whole, for more parameters, does better",
        tests=(
            Better("study-criteria", "dense v_proj", "SMT, abs_of_sum", "math"),
            Better("table2", "control: dense v_proj", "SMT", "choice"),
        ),
    ),
    Claim(
        "prompts trained on",
        "The paper's baselines were trained on the prompt too, and SMT was not",
        why_not="every arm here has the same masks; what the paper's had is not in it",
    ),
    Claim(
        "leaks",
        "Test questions of AddSub, MultiArith and SingleEq are among the rows of Math10K",
        why_not="Math10K is not here; the data of these tiers is checked, and its pages name what is found",
    ),
)
