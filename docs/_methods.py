"""What the site says of each method beside its docstring: what for, when, and when not."""

from typing import NamedTuple

# The purposes in the order in which they are shown.
BASELINE = "Baselines, and weights of your own"
SCALE = "Losses or gradients of different size"
PACE = "Tasks that learn at different pace"
CONFLICT = "Gradients in conflict"
CHOICE = "A trade-off that you choose"
PINN = "Physics-informed networks"
ROBUST = "Broken tasks"
RANDOM = "Random weights"
PURPOSES = (BASELINE, SCALE, PACE, CONFLICT, CHOICE, PINN, ROBUST, RANDOM)


class Advice(NamedTuple):
    """Of one method."""

    purpose: str
    use: str
    avoid: str


ADVICE = {
    "sum": Advice(
        BASELINE,
        "always first: what any other strategy has to beat",
        "one loss is many times as large as another",
    ),
    "mean": Advice(
        BASELINE,
        "as `sum`, where the learning rate shall not depend on the number of tasks",
        "one loss is many times as large as another",
    ),
    "weights": Advice(
        BASELINE,
        "you know how much each task matters, or can tune it",
        "there are many tasks: the search grows with each",
    ),
    "uncertainty": Advice(
        SCALE,
        "losses have different units or noise; the cheapest remedy to try",
        "a loss nears 0 or is negative: its weight grows without end",
    ),
    "uwso": Advice(
        SCALE,
        "as `uncertainty`, without weights to learn; its temperature is to be tuned",
        "losses can be 0 or negative",
    ),
    "imtl_l": Advice(
        SCALE,
        "losses shall count alike whatever their size",
        "their size says how much they matter",
    ),
    "imtl": Advice(
        SCALE,
        "both the losses' sizes and their conflict are to be treated",
        "K backward passes are too many",
    ),
    "scale_invariant": Advice(
        SCALE,
        "losses are positive and only their relative change counts",
        "a loss nears 0: its gradient is divided by it",
    ),
    "gls": Advice(
        SCALE,
        "few positive losses, whose product shall fall",
        "there are many tasks, or a loss nears 0 and silences the others",
    ),
    "gradnorm": Advice(
        SCALE,
        "gradients differ in norm and tasks in pace; measured at the last shared layer it is cheap",
        "no layer speaks for the trunk, or two more hyperparameters are too many",
    ),
    "db_mtl": Advice(
        SCALE,
        "both losses and gradients are to be brought to one size",
        "memory for K gradients and their running means is short",
    ),
    "encodec": Advice(
        SCALE,
        "losses shall have chosen shares of the gradient, whatever their units",
        "a gradient that fades shall be allowed to fade",
    ),
    "metabalance": Advice(
        SCALE,
        "auxiliary tasks shall not outweigh the one that matters, layer by layer",
        "all tasks matter alike",
    ),
    "dwa": Advice(
        PACE,
        "one loss stalls while others fall, and nothing may be paid for it",
        "losses are noisy from batch to batch: widen its window",
    ),
    "dtp": Advice(
        PACE,
        "each task has a metric in [0, 1], and the hard ones come first",
        "you have only losses",
    ),
    "famo": Advice(
        PACE,
        "losses shall fall equally fast in proportion, at the cost of one pass",
        "losses can be 0 or negative",
    ),
    "softadapt": Advice(
        PACE,
        "losses are smooth, as those of full batches",
        "losses are noisy from batch to batch",
    ),
    "cov": Advice(
        PACE,
        "a loss that still moves shall count more than one that has settled",
        "noise, not progress, is what makes a loss vary",
    ),
    "excess_mtl": Advice(
        PACE,
        "some labels are noisy, and the distance to what is reachable shall count",
        "memory for K gradients and their squares is short",
    ),
    "go4align": Advice(
        PACE,
        "there are many tasks, some of them alike, and one pass must do",
        "there are two or three tasks: there is nothing to group",
    ),
    "auto_lambda": Advice(
        PACE,
        "auxiliary tasks shall count as far as they help the main ones on other data",
        "there is no second batch to spare",
    ),
    "moml": Advice(
        PACE,
        "weights shall help every task on other data",
        "there is no second batch to spare",
    ),
    "forum": Advice(
        PACE,
        "as `moml`, where the parameters shall follow the other batch too",
        "there is no second batch to spare",
    ),
    "ldc_mtl": Advice(
        PACE,
        "the distances between losses shall shrink, at the cost of one pass",
        "losses differ by nature and shall stay apart",
    ),
    "rlw": Advice(
        RANDOM,
        "a baseline is wanted that no tuning can flatter",
        "steps must repeat, or batches are small already",
    ),
    "rgw": Advice(
        RANDOM,
        "as `rlw`, but heads shall follow their own loss",
        "steps must repeat, or batches are small already",
    ),
    "stch": Advice(
        CHOICE,
        "the worst task counts, in proportions that you give",
        "the losses have other units and no preference says how to compare them",
    ),
    "cosmos": Advice(
        CHOICE,
        "one model shall serve many preferences, which are drawn anew in each step",
        "one preference is all that you need: `weights` is simpler",
    ),
    "pbi": Advice(
        CHOICE,
        "the losses shall stand in a chosen ratio, at the cost of one pass",
        "nothing is known of the ratios that can be reached",
    ),
    "epo": Advice(
        CHOICE,
        "the losses shall end in an exact ratio, on the front",
        "a rough trade-off will do: `stch` costs one pass",
    ),
    "pareto": Advice(
        CHOICE,
        "a business has an order of importance: least weights by `floors=`",
        "gradients differ much in norm: the shortest gets all that is free",
    ),
    "pcd": Advice(
        CHOICE,
        "one task matters, and the others shall still progress",
        "all tasks matter alike",
    ),
    "mgda": Advice(
        CONFLICT,
        "no task may get worse in any step; a first look at the front",
        "gradients differ much in norm: the shortest rules, unless `normalize=` is set",
    ),
    "pcgrad": Advice(
        CONFLICT,
        "gradients conflict now and then, and else the sum is right",
        "one gradient is many times as long: it rules as in the sum",
    ),
    "gradvac": Advice(
        CONFLICT,
        "tasks are related, and their cosines shall stay near their usual",
        "the same as for `pcgrad`",
    ),
    "gradcraft": Advice(
        CONFLICT,
        "gradients differ in norm and conflict, in recommenders for instance",
        "the norms say how much a task matters",
    ),
    "cagrad": Advice(
        CONFLICT,
        "near the mean, but the worst task shall gain",
        "one gradient is many times as long: the mean is its",
    ),
    "imtl_g": Advice(
        CONFLICT,
        "every task shall gain alike, whatever its norm",
        "a task is nearly solved: its short gradient is followed as the others",
    ),
    "nash_mtl": Advice(
        CONFLICT,
        "gains shall be fair whatever the scale of the losses",
        "the update must shrink as gradients do: its length is its own",
    ),
    "fairgrad": Advice(
        CONFLICT,
        "as `nash_mtl`, with a dial from the sum to the worst task",
        "the update must shrink as gradients do: its length is its own",
    ),
    "aligned_mtl": Advice(
        CONFLICT,
        "gradients conflict and one of them dominates",
        "two tasks are nearly the same: their difference counts as much as what they share",
    ),
    "upgrad": Advice(
        CONFLICT,
        "no task may get worse in any step, and long gradients shall still count for more",
        "tasks are many and the step must be short",
    ),
    "dualproj": Advice(
        CONFLICT,
        "the step nearest to the mean in which no task gets worse",
        "one gradient is many times as long: the mean is its",
    ),
    "conflict_free": Advice(
        CONFLICT,
        "every task shall gain alike by angle; made for physics-informed networks",
        "tasks are more than parameters, or two of them oppose each other exactly",
    ),
    "conicgrad": Advice(
        CONFLICT,
        "near the mean by angle, with the worst task's gain in view",
        "one gradient is many times as long: the mean is its",
    ),
    "graddrop": Advice(
        CONFLICT,
        "entries of gradients disagree in sign, as noise that may help",
        "steps must repeat, or memory for K gradients is short",
    ),
    "moco": Advice(
        CONFLICT,
        "batches are small and the min-norm weights jump",
        "memory for K running gradients is short",
    ),
    "modo": Advice(
        CONFLICT,
        "the bias of weights and step from one batch matters",
        "two batches a step are too many",
    ),
    "sdmgrad": Advice(
        CONFLICT,
        "as `modo`, with a direction to stay near to",
        "three batches a step are too many",
    ),
    "cr_mogm": Advice(
        CONFLICT,
        "another aggregator's weights jump from batch to batch",
        "gradients change fast: its weights lag behind",
    ),
    "adatask": Advice(
        CONFLICT,
        "one task rules Adam's moments; it takes the place of Adam",
        "memory for two moments a task is short",
    ),
    "m_config": Advice(
        CONFLICT,
        "`conflict_free` is wanted at about the cost of a plain step",
        "there are many tasks: each is seen every K-th step",
    ),
    "relobralo": Advice(
        PINN,
        "terms fall at different pace, at the cost of one pass",
        "losses are noisy from batch to batch",
    ),
    "ntk": Advice(
        PINN,
        "terms converge at different rates, on full or fixed points",
        "the traces of the kernels are too dear: `lr_annealing` needs the rows",
    ),
    "lr_annealing": Advice(
        PINN,
        "boundary terms are drowned by the residual, which stands first",
        "no term is a residual that the others shall follow",
    ),
    "grad_norm_weights": Advice(
        PINN,
        "terms differ in gradient norm by orders; weights are refreshed now and then",
        "a gradient fades because its term is solved",
    ),
    "db_pinn": Advice(
        PINN,
        "boundary and initial terms differ among themselves, too",
        "no term is a residual that the others shall follow",
    ),
    "krum": Advice(
        ROBUST,
        "one gradient may be wrong by any amount, of a worker or a label",
        "tasks differ by nature: the odd one out is a task, too",
    ),
    "trimmed_mean": Advice(
        ROBUST,
        "entries of a few gradients may be wrong by any amount",
        "there are only two or three tasks",
    ),
}
