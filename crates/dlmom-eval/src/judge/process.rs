//! One program in one process.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};
use serde_json::json;
use tempfile::TempDir;

use super::{JudgeError, Limits, Program, Verdict};

const RUNNER: &str = include_str!("runner.py");

/// Between two looks at whether the process is still there.
const SLICE: Duration = Duration::from_millis(20);

/// The runner says less; a program that found its channel may say more.
const MOST_BYTES: usize = 4096;

pub(super) fn judge(
    python: &Path,
    limits: &Limits,
    program: &Program<'_>,
) -> Result<Verdict, JudgeError> {
    let nonce = nonce().map_err(|e| system(&e))?;
    let mut running = Running::start(python, limits, program, &nonce).map_err(|e| system(&e))?;
    running.verdict(&nonce, Instant::now() + limits.wall)
}

fn system(error: &std::io::Error) -> JudgeError {
    JudgeError::System(error.to_string())
}

/// 128 random bits. Whoever writes them to the channel was told them.
fn nonce() -> std::io::Result<String> {
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// A process with its group and folder; all of them end with it.
struct Running {
    child: Child,
    channel: ChildStdout,
    home: TempDir,
}

impl Running {
    fn start(
        python: &Path,
        limits: &Limits,
        program: &Program<'_>,
        nonce: &str,
    ) -> std::io::Result<Self> {
        let home = tempfile::Builder::new().prefix("dlmom-code-").tempdir()?;
        // A file without a name, not a pipe: a process that does not read cannot block its parent.
        let mut job = tempfile::tempfile()?;
        serde_json::to_writer(
            &job,
            &json!({
                "nonce": nonce,
                "source": program.source,
                "test": program.test,
                "entry_point": program.entry_point,
                "seconds": limits.wall.as_secs() + 1,
                "memory": limits.memory,
                "file": limits.file,
            }),
        )?;
        job.rewind()?;
        // Not `-I`: it would ignore the hash seed, and programs that iterate over sets would be judged by chance. What it keeps
        // out is not there: the environment is cleared and the working folder empty.
        let mut child = Command::new(python)
            .args(["-s", "-S", "-B", "-X", "utf8", "-c", RUNNER])
            .env_clear()
            .env("PYTHONHASHSEED", "0")
            .env("HOME", home.path())
            .env("TMPDIR", home.path())
            .current_dir(home.path())
            .stdin(Stdio::from(job))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let channel = child.stdout.take();
        let mut channel = channel.ok_or_else(|| std::io::Error::other("no pipe"));
        if let Ok(open) = &mut channel
            && let Err(error) = rustix::io::ioctl_fionbio(&*open, true)
        {
            channel = Err(error.into());
        }
        match channel {
            Ok(channel) => Ok(Self {
                child,
                channel,
                home,
            }),
            Err(error) => {
                end(&mut child, home.path());
                Err(error)
            }
        }
    }

    fn verdict(&mut self, nonce: &str, deadline: Instant) -> Result<Verdict, JudgeError> {
        let mut said = Vec::new();
        loop {
            // Before reading: what a process wrote is in the pipe once it has gone.
            let gone = self.gone().map_err(|e| system(&e))?;
            let closed = self.listen(&mut said).map_err(|e| system(&e))?;
            let heard = heard(&said, nonce)?;
            if let Some(verdict) = heard.verdict {
                return Ok(verdict);
            }
            // A process that left its group may hold the pipe open for ever, so its end is not waited for.
            if gone || closed || said.len() >= MOST_BYTES {
                return if heard.ready {
                    Ok(Verdict::Failed("ended without a verdict".into()))
                } else {
                    Err(JudgeError::Runner("it ended without a word".into()))
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return if heard.ready {
                    Ok(Verdict::TimedOut)
                } else {
                    Err(JudgeError::Runner("it did not start in time".into()))
                };
            }
            self.wait(left.min(SLICE)).map_err(|e| system(&e))?;
        }
    }

    /// Waits until there is something to read, for `time` at most.
    fn wait(&self, time: Duration) -> std::io::Result<()> {
        let mut fds = [PollFd::new(&self.channel, PollFlags::IN)];
        let timeout = Timespec::try_from(time).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what is there; true at its end.
    fn listen(&mut self, said: &mut Vec<u8>) -> std::io::Result<bool> {
        let mut buffer = [0u8; 512];
        while said.len() < MOST_BYTES {
            match self.channel.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(n) => said.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    /// Whether the process has ended. It is not reaped, so that its group cannot be another's yet.
    fn gone(&self) -> std::io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match waitid(WaitId::Pid(Pid::from_child(&self.child)), options) {
            Ok(status) => Ok(status.is_some()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child, self.home.path());
    }
}

/// What the runner said so far.
struct Heard {
    ready: bool,
    verdict: Option<Verdict>,
}

fn heard(said: &[u8], nonce: &str) -> Result<Heard, JudgeError> {
    let mut heard = Heard {
        ready: false,
        verdict: None,
    };
    let Some(end) = said.iter().rposition(|b| *b == b'\n') else {
        return Ok(heard);
    };
    for line in said[..end].split(|b| *b == b'\n') {
        let line = String::from_utf8_lossy(line);
        let Some(word) = line.strip_prefix(nonce).and_then(|l| l.strip_prefix(' ')) else {
            continue;
        };
        let (word, detail) = word.split_once(' ').unwrap_or((word, ""));
        heard.verdict = match word {
            "ready" => {
                heard.ready = true;
                continue;
            }
            "passed" => Some(Verdict::Passed),
            "failed" => Some(Verdict::Failed(detail.to_owned())),
            "no-program" => Some(Verdict::NoProgram),
            "broken-test" => return Err(JudgeError::Test(detail.to_owned())),
            _ => continue,
        };
        break;
    }
    Ok(heard)
}

/// Ends the process, its group, and those that left the group.
fn end(child: &mut Child, home: &Path) {
    // Neither can fail in a way that could be mended here: whatever is gone already is as it should be.
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.wait();
    end_strays(home);
}

/// Ends processes that were started with `home` as their folder for temporary files. Only where there is a `/proc`.
fn end_strays(home: &Path) {
    let mark = [b"TMPDIR=", home.as_os_str().as_bytes()].concat();
    // Whoever forks while the list is read and ends may not be on it, and its child neither: the child is on the next one.
    let mut clean = 0;
    for _ in 0..20 {
        let mut found = false;
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.parse().ok());
            let Some(pid) = pid.and_then(Pid::from_raw) else {
                continue;
            };
            let Ok(environment) = std::fs::read(entry.path().join("environ")) else {
                continue;
            };
            if environment.split(|b| *b == 0).any(|entry| entry == mark) {
                found = true;
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        clean = if found { 0 } else { clean + 1 };
        if clean == 2 {
            return;
        }
        if found {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
