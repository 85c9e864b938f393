"""Faults of native programs: their interpreter, how graphs become operations, the space of the batch."""

from tools.faults.base import Fault

OPERATIONS, ENGINE = "tests/test_native_operations.py", "tests/test_engines_native.py"
BATCH = "tests/test_native_batch_space.py"
GRAPHS, GRADIENTS = "tests/test_native_graphs.py", "tests/test_gradients.py"
FOLDER = "hvp_engine/differentiation/native"

FAULTS = [
    Fault(
        "csrc/tile_products.cpp",
        "if (p.beta != T(0)) result += p.beta * load(to, rows);",
        "if (p.beta != T(0)) result += load(to, rows) * p.alpha;",
        f"{OPERATIONS} -k larger_products",
        "a product onto something scales that; noticed where AVX-512 tiles are in use",
    ),
    Fault(
        "csrc/tile_products.cpp",
        "static_cast<Mask<T>>((1u << rows) - 1)",
        "all<T>()",
        f"{GRAPHS} -k any_number_of_rows",
        "the last vector of a column is written whole; noticed where AVX-512 tiles are in use",
    ),
    Fault(
        "csrc/program_reader.h",
        "if (!empty && last >= slot.numel) {",
        "if (!empty && last > slot.numel) {",
        f"{ENGINE} -k leave_their_memory",
        "a program may read one element behind its memory",
    ),
    Fault(
        "csrc/program_reductions.h",
        "if (!skipped && (row < 0 || row >= lookup.rows)) {",
        "if (!skipped && row >= lookup.rows) {",
        f"{ENGINE} -k out_of_range",
        "a negative index reads in front of the table",
    ),
    Fault(
        "csrc/program_reductions.h",
        "if (skipped && lookup.scatter) continue;",
        "",
        f"{OPERATIONS} -k embedding",
        "the gradient of an embedding's padding is not zero",
    ),
    Fault(
        "csrc/program.cpp",
        "    written |= instruction.to == output.source;",
        "",
        f"{ENGINE} {OPERATIONS} -k 'solver or random'",
        "an operation overwrites an input that it reads again",
    ),
    Fault(
        f"{FOLDER}/memory_plan.py",
        "if last[root] == now and",
        "if last[root] >= now and",
        OPERATIONS,
        "a result is written over an operand that is read later",
    ),
    Fault(
        f"{FOLDER}/memory_plan.py",
        "if when < now",
        "if when <= now",
        OPERATIONS,
        "memory is given back while its last reader still reads",
    ),
    Fault(
        f"{FOLDER}/conversion.py",
        "        if place.region.tangent:\n            place = self.builder.copied(place)\n",
        "",
        "tests/test_engines_linearized.py tests/test_engines_native.py -k 'views or solver'",
        "an update overwrites a tangent that is a summand of another weight's product",
    ),
    Fault(
        f"{FOLDER}/updates.py",
        "and later[0].target == target and later[0].source != target:",
        "and later[0].target == target:",
        f"{ENGINE} -k solver",
        "a vector is added to itself before the product is subtracted from it",
    ),
    Fault(
        f"{FOLDER}/batch_space.py",
        "if len(tangent.users) != 1 or",
        "if",
        f"{BATCH} -k otherwise",
        "a weight that something else reads, too, is kept in the space of the batch",
    ),
    Fault(
        f"{FOLDER}/batch_space.py",
        " and all(decay.expand(n, m).stride(1) == 0 for decay in decays)",
        "",
        f"{BATCH} -k dense",
        "a decay that differs along a row is taken for one number",
    ),
    Fault(
        f"{FOLDER}/batch_space.py",
        "(0 if grams_exist else rows * rows * m)",
        "0",
        f"{BATCH} -k repay",
        "what Gram matrices cost is not counted",
    ),
    Fault(
        f"{FOLDER}/program.py",
        "            build.stored(build.filled(factor.sizes, 0.0), states[2 * i + 1])\n",
        "",
        f"{BATCH} -k eager",
        "a solve begins with the combinations of the one before",
    ),
    Fault(
        f"{FOLDER}/extension.py",
        "            done += bad\n",
        "            done += bad + 1\n",
        f"{ENGINE} -k strides",
        "a tangent of other strides is left out",
    ),
    Fault(
        "hvp_engine/differentiation/trace/broadcasting.py",
        "        if any(value.dtype != result.dtype for value in values):\n            continue",
        "        if False:\n            continue",
        "tests/test_trace_broadcasting.py",
        "a factor without dimensions changes the type of a result",
    ),
    Fault(
        "csrc/elementary_functions.h",
        "kInfinite = 89.0F",
        "kInfinite = 88.0F",
        f"{GRAPHS} -k float32_functions",
        "e^x stops growing before float32 ends",
    ),
    Fault(
        "csrc/tile_products.cpp",
        "const int64_t rows = std::min<int64_t>(V * kLanes, p.count - s);",
        "const int64_t rows = V * kLanes;",
        f"{GRAPHS} -k few_with_many",
        "the padding of packed columns is written too; noticed where AVX-512 tiles are in use",
    ),
    Fault(
        f"{FOLDER}/graph_program.py",
        "if node.target is aten.clone.default and any(",
        "if False and any(",
        f"{GRADIENTS} -k modes_of_modules",
        "batch normalization updates the caller's statistics through a copy that is none",
    ),
    Fault(
        f"{FOLDER}/nonlinear.py",
        "if reduction == _MEAN:\n        loss = build.combined(Code.DIVIDE, [loss, valid], total.sizes)",
        "if reduction == _MEAN:\n        loss = build.combined(Code.SCALE, [loss], total.sizes, 1.0 / classes.numel)",
        f"{GRAPHS} -k ignored",
        "the mean of a loss counts examples that are ignored",
    ),
    Fault(
        "hvp_engine/engines/gradients.py",
        "if not known.schedule.due_alone():",
        "if known.schedule.calls or not known.schedule.due_alone():",
        f"{GRADIENTS} -k closure",
        "a traced gradient is compared with autograd's only once",
    ),
    Fault(
        "hvp_engine/engines/native_whole.py",
        "            and self._read_by_train.settled(functions.schedule)\n",
        "",
        "tests/test_engines_native_whole.py -k 'reads or checks'",
        "a settled hypergradient goes on where the training loss reads something else, and is never checked",
    ),
    Fault(
        "hvp_engine/engines/native_whole.py",
        "program.bind(handed_out=range(len(program.seen)))\n        self._holders.append",
        "program.bind()\n        self._holders.append",
        "tests/test_engines_native_whole.py -k eagers",
        "a result is overwritten by the next call",
    ),
    Fault(
        "hvp_engine/engines/native_whole.py",
        "if program.random or not (",
        "if not (",
        f"{GRADIENTS} -k dropout",
        "random numbers of a validation loss are drawn from the caller's generator",
    ),
]
