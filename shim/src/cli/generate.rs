//! Completion scripts and manual pages, both from the definition of the arguments.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap_complete::Shell;

/// Prints the completion script for `shell`.
pub(super) fn completions(
    shell: Shell,
    mut command: clap::Command,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "bulkhead", &mut script);
    Ok(out.write_all(&script)?)
}

/// Writes one manual page for the command and one for each subcommand.
pub(super) fn man(command: clap::Command, directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    clap_mangen::generate_to(command, directory)
        .with_context(|| format!("cannot write the manual pages to {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn each_shell_gets_a_script_with_the_subcommands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            completions(shell, super::super::Cli::command(), &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            assert!(
                script.contains("check") && script.contains("--output") | script.contains("-l output"),
                "{shell}"
            );
        }
    }

    #[test]
    fn each_subcommand_gets_a_page() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("made/as/needed");
        man(super::super::Cli::command(), &target).unwrap();
        for page in
            ["bulkhead.1", "bulkhead-check.1", "bulkhead-collect.1", "bulkhead-logs.1", "bulkhead-metrics.1"]
        {
            let text =
                std::fs::read_to_string(target.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
            assert!(text.contains(".SH NAME"), "{page}");
        }
    }
}
