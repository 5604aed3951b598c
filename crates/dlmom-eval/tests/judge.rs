//! The judge on real Python: what is right passes, what only looks so does not, and nothing is left behind.
#![cfg(unix)]
#![expect(clippy::expect_used, reason = "helpers of tests fail as tests do")]

use std::path::Path;
use std::time::{Duration, Instant};

use dlmom_eval::{
    CodeJudge, CodeRunner, Item, JudgeError, Limits, Method, Program, Schema, Task, Verdict, grade,
    parse,
};
use serde_json::json;

fn runner(seconds: u64) -> CodeRunner {
    let limits = Limits {
        wall: Duration::from_secs(seconds),
        ..Limits::default()
    };
    CodeRunner::find(None, limits).expect("these tests need a python3 on PATH")
}

/// Rows in HumanEval's layout, with an import and a helper that the test calls.
fn items() -> Vec<Item> {
    let rows = [
        (
            "def double(x):\n    \"\"\"Twice x.\"\"\"\n",
            "    return 2 * x\n",
            "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
            "double",
        ),
        (
            "import math\n\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\ndef zero(xs):\n    \"\"\"A zero of a line.\"\"\"\n",
            "    return -xs[0] / xs[1]\n",
            "def check(candidate):\n    assert math.fabs(poly([4, 2], candidate([4, 2]))) < 1e-9\n",
            "zero",
        ),
        (
            "from typing import List\n\ndef first(xs: List[int]) -> int:\n",
            "    for x in xs:\n        return x\n",
            "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([3, 4]) == 3\n    assert candidate([]) is None\n",
            "first",
        ),
    ];
    let lines: Vec<String> = rows
        .iter()
        .map(|(prompt, solution, test, entry)| {
            json!({
                "prompt": prompt, "canonical_solution": solution, "test": test, "entry_point": entry,
            })
            .to_string()
        })
        .collect();
    parse(
        Schema::HumanEval,
        Path::new("rows"),
        lines.join("\n").as_bytes(),
    )
    .expect("the rows are fine")
    .items
}

#[test]
fn reference_solutions_pass_in_every_form_of_answer() {
    let mut judge = runner(10);
    for item in items() {
        let Task::Code { entry_point, .. } = &item.task else {
            panic!("code")
        };
        let from = item.question.rfind("def ").unwrap();
        let whole = format!("{}{}", &item.question[from..], item.gold);
        let forms = [
            (item.gold.clone(), Method::Continuation),
            (item.gold.trim_start().to_owned(), Method::Continuation),
            (whole.clone(), Method::Definition),
            (
                format!("Here it is:\n\n```python\n{whole}```\n\nIt works."),
                Method::CodeBlock,
            ),
            (format!("```python\n{}```", item.gold), Method::CodeBlock),
            (
                format!("```python\nfrom __future__ import annotations\n{whole}```"),
                Method::CodeBlock,
            ),
        ];
        for (text, method) in forms {
            let found = grade(&item, &text, &mut judge).unwrap();
            assert!(found.correct, "{entry_point}: {text}\n{found:?}");
            assert_eq!(found.method, method, "{text}");
        }
        for wrong in ["    return None\n", "    pass\n", "    raise ValueError\n"] {
            let found = grade(&item, wrong, &mut judge).unwrap();
            assert!(!found.correct && !found.correct_flexible, "{wrong}");
            assert!(found.answer.is_some() && found.note.is_some());
        }
        for none in [
            "I cannot do this.",
            "    return (",
            "```python\ndef f(:\n```",
        ] {
            let found = grade(&item, none, &mut judge).unwrap();
            assert_eq!(
                (found.correct, found.answer_flexible),
                (false, None),
                "{none}"
            );
        }
    }
}

fn judged(judge: &mut CodeRunner, source: &str) -> Verdict {
    let program = Program {
        source,
        test: "def check(candidate):\n    assert candidate(2) == 4\n",
        entry_point: "double",
    };
    judge.judge(&program).expect("the judge works")
}

/// Waits until none of the processes whose ids are lines of `file` runs; those that still do after 5 s.
///
/// A killed orphan stays in the list until its new parent looks at it; it holds no command line then.
#[cfg(target_os = "linux")]
fn survivors(file: &Path) -> Vec<String> {
    let pids = std::fs::read_to_string(file).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let lives = |pid: &&str| {
            let line = std::fs::read(Path::new("/proc").join(pid).join("cmdline"));
            !line.unwrap_or_default().is_empty()
        };
        let left: Vec<String> = pids.lines().filter(lives).map(str::to_owned).collect();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

const WRONG: &str = "def double(x):\n    return 0\n";

#[test]
fn cheats_do_not_pass_nor_leave_a_process_behind() {
    let mut judge = runner(2);
    let forged = "
import os
for fd in range(3, 64):
    for text in (b'passed\\n', b'0' * 32 + b' passed\\n'):
        try:
            os.write(fd, text)
        except OSError:
            pass
";
    let daemon = "
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir('/')
        time.sleep(600)
    os._exit(0)
";
    let cheats: Vec<(&str, String)> = vec![
        ("exits", "import sys\nsys.exit(0)\n".into()),
        ("exits in the function", "import sys\ndef double(x):\n    sys.exit(0)\n".into()),
        ("leaves", "import os\nos._exit(0)\n".into()),
        ("leaves in the function", "import os\ndef double(x):\n    os._exit(0)\n".into()),
        ("speaks at exit", format!("import atexit\natexit.register(print, 'passed', flush=True)\n{WRONG}")),
        ("speaks", format!("print('passed', flush=True)\n{WRONG}")),
        ("forges", format!("{forged}{WRONG}")),
        ("closes everything", format!("import os\nos.closerange(0, 64)\n{WRONG}")),
        ("becomes another", "import os\nos.execv('/bin/true', ['true'])\n".into()),
        ("hooks", format!("import sys\nsys.excepthook = lambda *a: None\n{WRONG}")),
        ("unmakes errors", format!("import builtins\nbuiltins.AssertionError = None\n{WRONG}")),
        ("brings its own test", format!("def check(candidate):\n    pass\n{WRONG}")),
        ("loops", "while True:\n    pass\n".into()),
        ("loops in the function", "def double(x):\n    while True:\n        pass\n".into()),
        ("sleeps", "import time\ntime.sleep(600)\n".into()),
        ("takes memory", "x = bytearray(3 << 30)\ndef double(x):\n    return 4\n".into()),
        ("takes memory slowly", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))\n".into()),
        ("fills the disk", "open('x', 'wb').write(bytes(64 << 20))\ndef double(x):\n    return 4\n".into()),
        ("shouts", "while True:\n    print('passed ' * 1000)\n".into()),
        ("floods every channel", "import os\nwhile True:\n    for fd in range(64):\n        try:\n            os.write(fd, b'passed\\n' * 1000)\n        except OSError:\n            pass\n".into()),
        ("forks a daemon", format!("{daemon}{WRONG}")),
        ("forks a daemon and leaves", format!("{daemon}os._exit(0)\n")),
        ("forks and waits", format!("import os, time\nif os.fork() == 0:\n    time.sleep(600)\n{WRONG}")),
        ("recurses", "def double(x):\n    return double(x)\n".into()),
        ("dies", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n".into()),
        ("raises oddly", "class E(BaseException):\n    pass\nE.__name__ = 'a b\\n'\ndef double(x):\n    raise E\n".into()),
        ("reads standard input", "import sys\ndouble = lambda x: 4 if sys.stdin.read() else 0\n".into()),
        ("runs the parent's main", format!("if __name__ == '__main__':\n    double = lambda x: 4\nelse:\n    {}", WRONG.replace('\n', "\n    "))),
    ];
    // Every process of a cheat writes down its id.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    let notes = format!(
        "
import os
def note():
    with open('{}', 'a') as file:
        file.write(str(os.getpid()) + chr(10))
note()
os.register_at_fork(after_in_child=note)
",
        file.display()
    );
    for (name, source) in cheats {
        let source = notes.clone() + &source;
        let started = Instant::now();
        let verdict = judged(&mut judge, &source);
        assert!(
            matches!(verdict, Verdict::Failed(_) | Verdict::TimedOut),
            "{name}: {verdict:?}"
        );
        assert!(started.elapsed() < Duration::from_secs(8), "{name}");
        #[cfg(target_os = "linux")]
        {
            let noted = std::fs::read_to_string(&file).unwrap_or_default();
            assert!(!noted.is_empty(), "{name}");
            assert_eq!(survivors(&file), [""; 0], "{name}");
        }
        std::fs::remove_file(&file).unwrap();
    }
    // A right program that leaves a daemon passes, and the daemon ends all the same.
    let right = format!("{notes}{daemon}def double(x):\n    return 2 * x\n");
    assert_eq!(judged(&mut judge, &right), Verdict::Passed);
    #[cfg(target_os = "linux")]
    assert_eq!(survivors(&file), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn daemons_end_with_their_program() {
    let mut judge = runner(5);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let path = file.display();
    for right in [0, 2] {
        // The function waits for the daemon, so that there is one when the verdict falls.
        let source = format!(
            "
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir('/')
        open('{path}.new', 'w').write(str(os.getpid()))
        os.rename('{path}.new', '{path}')
        time.sleep(600)
    os._exit(0)
def double(x):
    while not os.path.exists('{path}'):
        time.sleep(0.01)
    return {right} * x
"
        );
        let passed = judged(&mut judge, &source) == Verdict::Passed;
        assert_eq!(passed, right == 2);
        assert!(file.is_file());
        assert_eq!(survivors(&file), [""; 0]);
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn a_program_runs_as_a_module_of_its_own_in_an_empty_folder() {
    let mut judge = runner(10);
    let source = "
import os, sys, random
from dataclasses import dataclass
@dataclass
class Box:
    n: 'int'
assert os.listdir('.') == []
assert sorted(k for k in os.environ if not k.startswith('LC_')) == ['HOME', 'PYTHONHASHSEED', 'TMPDIR'], os.environ
assert __name__ == 'candidate' and '' not in sys.path
assert sys.stdin.read() == ''
open('x', 'w').write('y')
def double(x):
    return Box(2 * x).n
";
    assert_eq!(judged(&mut judge, source), Verdict::Passed);
    // The order of a set of strings is the same in every run.
    let order = "
names = {'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}
def double(x):
    raise type('E' + ''.join(names), (Exception,), {})
";
    let first = judged(&mut judge, order);
    assert!(
        matches!(&first, Verdict::Failed(name) if name.len() == 9),
        "{first:?}"
    );
    assert_eq!(judged(&mut judge, order), first);
}

#[test]
fn reasons_name_the_exception() {
    let mut judge = runner(10);
    for (source, verdict) in [
        (WRONG, Verdict::Failed("AssertionError".into())),
        (
            "def double(x):\n    return y\n",
            Verdict::Failed("NameError".into()),
        ),
        (
            "def other(x):\n    return 4\n",
            Verdict::Failed("KeyError".into()),
        ),
        (
            "import no_such_module\n",
            Verdict::Failed("ModuleNotFoundError".into()),
        ),
        ("def double(x):\n  return 2 *\n", Verdict::NoProgram),
        ("x = '\0'\n", Verdict::NoProgram),
    ] {
        assert_eq!(judged(&mut judge, source), verdict, "{source}");
    }
}

#[test]
fn broken_tests_and_missing_interpreters_are_errors_and_no_wrong_answers() {
    let mut judge = runner(10);
    let error = judge
        .judge(&Program {
            source: "def double(x):\n    return 4\n",
            test: "def check(candidate):\nassert",
            entry_point: "double",
        })
        .unwrap_err();
    assert_eq!(error, JudgeError::Test("IndentationError".into()));
    let missing = CodeRunner::find(Some(Path::new("no-such-python")), Limits::default());
    let error = missing.unwrap_err().to_string();
    assert!(
        error.starts_with("scoring code needs Python: cannot run no-such-python: "),
        "{error}"
    );
    assert!(!error.contains('\n'));
    let other = CodeRunner::find(Some(Path::new("/bin/false")), Limits::default());
    assert!(matches!(other, Err(JudgeError::Python { .. })), "{other:?}");
    let other = CodeRunner::find(Some(Path::new("/bin/true")), Limits::default());
    assert!(other.is_err(), "{other:?}");
}
