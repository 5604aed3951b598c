//! One text, graded: what every row is made from.

use crate::choice::extract_choice;
use crate::code::extract_code;
use crate::extract::{Extraction, Method, extract, score};
use crate::items::{Item, Task};
use crate::judge::{CodeJudge, JudgeError, Program, Verdict};

/// What a text answers, and whether that is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grade {
    /// The strict answer is right.
    pub correct: bool,
    /// The flexible answer is right.
    pub correct_flexible: bool,
    /// The answer in a format that was asked for: a canonical number, a letter, or the source of a whole program.
    pub answer: Option<String>,
    /// The answer by any rule.
    pub answer_flexible: Option<String>,
    /// The rule that found the flexible answer.
    pub method: Method,
    /// Why a program did not pass, one line. May differ between machines.
    pub note: Option<String>,
}

impl Grade {
    fn wrong(extraction: Extraction) -> Self {
        Self {
            correct: false,
            correct_flexible: false,
            answer: extraction.strict,
            answer_flexible: extraction.flexible,
            method: extraction.method,
            note: None,
        }
    }
}

fn extraction(item: &Item, text: &str) -> Extraction {
    match &item.task {
        Task::Number => extract(text),
        Task::Choice { options } => extract_choice(text, options),
        Task::Code { entry_point, .. } => extract_code(text, &item.question, entry_point),
    }
}

/// The answer of `text` to `item`, not graded: for samples that failed, which are wrong whatever they say.
#[must_use]
pub fn read(item: &Item, text: &str) -> Grade {
    Grade::wrong(extraction(item, text))
}

/// The answer of `text` to `item`, graded. Only a program asks the judge. One that does not compile is no answer.
///
/// # Errors
/// [`JudgeError`]: the answer could not be judged, which says nothing about it.
pub fn grade(item: &Item, text: &str, judge: &mut dyn CodeJudge) -> Result<Grade, JudgeError> {
    let extraction = extraction(item, text);
    let Task::Code { test, entry_point } = &item.task else {
        let score = score(&item.gold, &extraction);
        return Ok(Grade {
            correct: score.correct,
            correct_flexible: score.correct_flexible,
            ..Grade::wrong(extraction)
        });
    };
    let Some(source) = &extraction.flexible else {
        return Ok(Grade::wrong(extraction));
    };
    let verdict = judge.judge(&Program {
        source,
        test,
        entry_point,
    })?;
    Ok(match verdict {
        Verdict::Passed => Grade {
            correct: true,
            correct_flexible: true,
            ..Grade::wrong(extraction)
        },
        Verdict::Failed(reason) => Grade {
            note: Some(reason),
            ..Grade::wrong(extraction)
        },
        Verdict::TimedOut => Grade {
            note: Some("out of time".into()),
            ..Grade::wrong(extraction)
        },
        Verdict::NoProgram => Grade {
            note: Some("does not compile".into()),
            ..Grade::wrong(Extraction::none(Method::None))
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::NoJudge;

    /// Says what it is told to, once.
    struct Says(Result<Verdict, JudgeError>);

    impl CodeJudge for Says {
        fn judge(&mut self, program: &Program<'_>) -> Result<Verdict, JudgeError> {
            assert_eq!(program.source, "def f(x):\n    return x");
            assert_eq!((program.test, program.entry_point), ("t", "f"));
            self.0.clone()
        }
    }

    fn item(task: Task, question: &str, gold: &str) -> Item {
        Item {
            id: "1".into(),
            question: question.into(),
            gold: gold.into(),
            solution: None,
            task,
        }
    }

    fn code() -> Item {
        let task = Task::Code {
            test: "t".into(),
            entry_point: "f".into(),
        };
        item(task, "def f(x):\n", "    return x")
    }

    #[test]
    fn numbers_and_letters_need_no_judge() {
        let number = item(Task::Number, "q", "18");
        let grade_of = |item: &Item, text: &str| grade(item, text, &mut NoJudge).unwrap();
        let found = grade_of(&number, "so 18");
        assert_eq!((found.correct, found.correct_flexible), (false, true));
        let options = ["fire", "ice"].map(str::to_owned).to_vec();
        let choice = item(Task::Choice { options }, "q", "B");
        let found = grade_of(&choice, "#### B");
        assert_eq!((found.correct, found.correct_flexible), (true, true));
        assert_eq!(found.answer.as_deref(), Some("B"));
        let found = grade_of(&choice, "I think that it is ice.");
        assert_eq!((found.correct, found.correct_flexible), (false, true));
        // A letter is no default.
        let found = grade_of(&choice, "I do not know.");
        assert_eq!(
            (found.answer_flexible, found.correct_flexible),
            (None, false)
        );
    }

    #[test]
    fn verdicts_become_grades_and_failures_of_the_judge_errors() {
        let text = "    return x";
        let of = |verdict| grade(&code(), text, &mut Says(Ok(verdict))).unwrap();
        let passed = of(Verdict::Passed);
        assert!(passed.correct && passed.correct_flexible);
        assert_eq!(passed.answer, passed.answer_flexible);
        assert_eq!(passed.answer.as_deref(), Some("def f(x):\n    return x"));
        for verdict in [Verdict::Failed("AssertionError".into()), Verdict::TimedOut] {
            let wrong = of(verdict);
            assert!(!wrong.correct && !wrong.correct_flexible);
            assert!(wrong.answer.is_some() && wrong.note.is_some());
        }
        let none = of(Verdict::NoProgram);
        assert_eq!((none.answer, none.method), (None, Method::None));
        let error = JudgeError::Runner("x".into());
        assert_eq!(
            grade(&code(), text, &mut Says(Err(error.clone()))),
            Err(error)
        );
        assert_eq!(
            grade(&code(), text, &mut NoJudge),
            Err(JudgeError::Unavailable)
        );
        // Nothing to judge.
        assert_eq!(
            grade(&code(), " \n", &mut NoJudge).unwrap(),
            read(&code(), "")
        );
    }
}
