//! What containerd's configuration has to say so that CRI knows our runtime: texts from texts.
//! Reads and writes no file.
//!
//! containerd 2 gets a file of its own beside its main one, and the main one a line that imports it, where it has
//! none. containerd 1.7 replaces the whole section of a plugin by an imported one, so there the main file itself
//! gets the table.

use anyhow::{Context, bail};
use toml_edit::{Array, DocumentMut, Item, Table};

/// The name that a RuntimeClass and `crictl runp --runtime` give.
pub(super) const HANDLER: &str = "bulkhead";

const DROP_IN: &str = include_str!("../../../../configs/containerd/bulkhead-2.toml");
const INLINE: &str = include_str!("../../../../configs/containerd/bulkhead-1.7.toml");
/// Of containerd 1.7; of 2.0 and later is `io.containerd.cri.v1.runtime`.
const OLD_PLUGIN: &str = "io.containerd.grpc.v1.cri";

/// The file beside the main one, for a containerd of this version from 2.0 on.
pub(super) fn drop_in(version: (u32, u32)) -> String {
    // 2.0 loses pods of the sandbox API when it is restarted (docs/compatibility.md).
    let classic = version == (2, 0);
    let kept = DROP_IN.lines().filter(|line| !(classic && line.trim_start().starts_with("sandboxer")));
    kept.fold(String::new(), |text, line| text + line + "\n")
}

fn parsed(main: &str) -> anyhow::Result<DocumentMut> {
    main.parse().map_err(|error: toml_edit::TomlError| anyhow::anyhow!("{}", error.message()))
}

/// The main file with a line that imports `glob`; an empty one is a new file for containerd 2.
pub(super) fn with_import(main: &str, glob: &str) -> anyhow::Result<String> {
    let mut document = parsed(main)?;
    let version = document.get("version").and_then(Item::as_integer);
    match version {
        None if document.is_empty() => {
            document.insert("version", toml_edit::value(3));
        }
        Some(3..) => {}
        older => bail!(
            "it is of version {}, from which no file of version 3 can be imported; bring it there by \
             `containerd config migrate`",
            older.unwrap_or(1)
        ),
    }
    let imports = document.entry("imports").or_insert_with(|| toml_edit::value(Array::new()));
    let imports = imports.as_array_mut().context("`imports` is no list in it")?;
    if !imports.iter().any(|import| import.as_str() == Some(glob)) {
        imports.push(glob);
    }
    Ok(document.to_string())
}

/// The main file without that line.
pub(super) fn without_import(main: &str, glob: &str) -> anyhow::Result<String> {
    let mut document = parsed(main)?;
    if let Some(imports) = document.get_mut("imports").and_then(Item::as_array_mut) {
        imports.retain(|import| import.as_str() != Some(glob));
        if imports.is_empty() {
            document.remove("imports");
        }
    }
    Ok(document.to_string())
}

/// The main file of containerd 1.7 with our runtime; an empty one is a new file. `before` is the whole configuration
/// that containerd has with it.
pub(super) fn with_runtime(main: &str, before: &toml::Table) -> anyhow::Result<String> {
    let mut document = parsed(main)?;
    match document.get("version").and_then(Item::as_integer) {
        Some(2) => {}
        None if document.is_empty() => {
            document.insert("version", toml_edit::value(2));
        }
        other => bail!(
            "it is of version {}, and containerd 1.7 is configured by version 2; bring it there by \
             `containerd config migrate`",
            other.unwrap_or(1)
        ),
    }
    let ours = parsed(INLINE)?;
    let ours =
        runtimes(&ours).and_then(|all| all.get(HANDLER)).context("no runtime in our own drop-in")?.clone();
    let mut at = document.as_table_mut();
    for name in ["plugins", OLD_PLUGIN, "containerd", "runtimes"] {
        at = at
            .entry(name)
            .or_insert_with(|| {
                let mut table = Table::new();
                // Its own header would say nothing.
                table.set_implicit(true);
                Item::Table(table)
            })
            .as_table_mut()
            .with_context(|| format!("`{name}` is no table with a header of its own in it"))?;
    }
    // A file that names a runtime has to name runc as well, with all that it has by default, or containerd 1.7 does
    // not know it any more.
    if at.is_empty() {
        let defaults = runtimes_of(before).context("containerd knows no runtime without ours")?;
        for (name, runtime) in parsed(&toml::to_string(defaults)?)?.as_table() {
            at.insert(name, runtime.clone());
        }
    }
    at.insert(HANDLER, ours);
    Ok(document.to_string())
}

/// The main file of containerd 1.7 without our runtime. What stays is as it was, but for runc, which may be named
/// where it was not before.
pub(super) fn without_runtime(main: &str) -> anyhow::Result<String> {
    let mut document = parsed(main)?;
    let mut at = Some(document.as_table_mut());
    for name in ["plugins", OLD_PLUGIN, "containerd", "runtimes"] {
        at = at.and_then(|table| table.get_mut(name)?.as_table_mut());
    }
    if let Some(runtimes) = at {
        runtimes.remove(HANDLER);
    }
    Ok(document.to_string())
}

fn runtimes_of(config: &toml::Table) -> Option<&toml::Table> {
    config.get("plugins")?.get(OLD_PLUGIN)?.get("containerd")?.get("runtimes")?.as_table()
}

fn runtimes(document: &DocumentMut) -> Option<&Table> {
    document.get("plugins")?.get(OLD_PLUGIN)?.get("containerd")?.get("runtimes")?.as_table()
}

/// What a configuration had and has no more, or has otherwise: nothing of it may be changed by ours.
pub(super) fn lost(before: &toml::Table, after: &toml::Table) -> Vec<String> {
    let mut lost = Vec::new();
    compare(before, after, "", &mut lost);
    lost
}

fn compare(before: &toml::Table, after: &toml::Table, prefix: &str, lost: &mut Vec<String>) {
    for (key, was) in before {
        let name = format!("{prefix}{key}");
        // Which files it was read from, and in which version, is no setting.
        if ["imports", "version"].contains(&name.as_str()) {
            continue;
        }
        match (was, after.get(key)) {
            (toml::Value::Table(was), Some(toml::Value::Table(is))) => {
                compare(was, is, &format!("{name}."), lost);
            }
            (was, Some(is)) if was == is => {}
            _ => lost.push(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::containerd;
    use super::*;

    const GLOB: &str = "/etc/containerd/conf.d/*.toml";

    fn table(text: &str) -> toml::Table {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn an_import_is_added_once_and_taken_back() {
        let main = "# ours\nversion = 3\n\n[grpc]\naddress = \"/a\" # here\n";
        let with = with_import(main, GLOB).unwrap();
        assert_eq!(table(&with)["imports"], toml::Value::from(vec![GLOB]));
        assert!(with.starts_with("# ours\n") && with.ends_with("address = \"/a\" # here\n"), "{with}");
        assert_eq!(with_import(&with, GLOB).unwrap(), with);
        assert_eq!(without_import(&with, GLOB).unwrap(), main);
    }

    #[test]
    fn other_imports_stay() {
        let main = "version = 3\nimports = [\"/x.toml\"]\n";
        let with = with_import(main, GLOB).unwrap();
        assert_eq!(table(&with)["imports"], toml::Value::from(vec!["/x.toml", GLOB]));
        assert_eq!(without_import(&with, GLOB).unwrap(), main);
    }

    #[test]
    fn a_file_that_cannot_import_ours_is_refused() {
        for main in ["version = 2\n", "[grpc]\n"] {
            let error = with_import(main, GLOB).unwrap_err();
            assert!(error.to_string().contains("config migrate"), "{error}");
        }
        assert!(with_import("imports = 3\nversion = 3\n", GLOB).is_err());
        assert!(with_import("a = ", GLOB).is_err());
        assert_eq!(table(&with_import("", GLOB).unwrap())["version"].as_integer(), Some(3));
    }

    #[test]
    fn containerd_1_7_gets_the_table_and_keeps_its_own() {
        let main = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"p\"\n\
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"r\"\n";
        let before = table(main);
        let with = with_runtime(main, &before).unwrap();
        assert_eq!(containerd::handlers(&table(&with)), [HANDLER]);
        assert_eq!(lost(&before, &table(&with)), Vec::<String>::new());
        assert_eq!(without_runtime(&with).unwrap(), main);
        assert_eq!(with_runtime(&with, &before).unwrap(), with);
        assert!(with_runtime("version = 3\n", &before).is_err());
    }

    #[test]
    fn containerd_1_7_knows_runc_beside_ours() {
        let defaults = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"r\"\n\
                        [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\nRoot = \"\"\n";
        let before = table(defaults);
        for main in ["", "version = 2\n"] {
            let with = table(&with_runtime(main, &before).unwrap());
            assert_eq!(containerd::handlers(&with), [HANDLER]);
            assert!(lost(&before, &with).is_empty());
        }
    }

    #[test]
    fn only_containerd_2_0_makes_pods_the_classic_way() {
        assert_eq!(drop_in((2, 4)), DROP_IN);
        let classic = table(&drop_in((2, 0)));
        assert_eq!(containerd::handlers(&classic), [HANDLER]);
        assert!(!drop_in((2, 0)).contains("\n  sandboxer"));
    }

    #[test]
    fn what_is_lost_is_named() {
        let before = table("version = 2\n[a]\nb = 1\nc = [1]\n[a.d]\ne = 2\n");
        let after = table("version = 3\nimports = [\"x\"]\nnew = 1\n[a]\nb = 2\n[a.d]\ne = 2\n");
        assert_eq!(lost(&before, &after), ["a.b", "a.c"]);
        assert!(lost(&before, &before).is_empty());
    }
}
