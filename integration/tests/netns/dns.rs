//! Names through the gateway's resolver, asked with dig.

use vunet_integration::lab::{BIG_TXT_BYTES, BIG_TXT_NAME, DOMAIN, GATEWAY, WORLD};

use crate::bench::{Bench, Failure, Setup, ensure, scenario};

fn dig(bench: &Bench, words: &[&str]) -> Result<String, Failure> {
    let server = format!("@{GATEWAY}");
    let mut command = vec!["dig", "+time=3", "+tries=2", &server];
    command.extend(words);
    bench.in_guest(&command)
}

#[test]
fn every_record_type_is_forwarded_as_it_came() {
    scenario(&Setup::new(), |bench| {
        let (www, alias) = (format!("www.{DOMAIN}"), format!("alias.{DOMAIN}"));
        let (sip, world) = (format!("_sip._tcp.{DOMAIN}"), WORLD.to_string());
        let questions: [(&str, &str, &str); 7] = [
            (&www, "A", &world),
            (&www, "AAAA", "2001:db8::2"),
            (&alias, "CNAME", "www.example.test."),
            (DOMAIN, "MX", "10 mail.example.test."),
            (DOMAIN, "TXT", "\"v=spf1 -all\" \"second string\""),
            (&sip, "SRV", "1 2 5060 sip.example.test."),
            (DOMAIN, "HTTPS", "1 . alpn=\"h2\""),
        ];
        for transport in ["+notcp", "+tcp"] {
            for (name, kind, want) in questions {
                let got = dig(bench, &["+short", transport, kind, name])?;
                ensure!(got.trim() == want, "{kind} {name} {transport}: {got:?} instead of {want:?}");
            }
            let missing = dig(bench, &[transport, "A", &format!("nobody.{DOMAIN}")])?;
            ensure!(missing.contains("status: NXDOMAIN"), "a name that does not exist: {missing}");
        }
        Ok(())
    });
}

#[test]
fn an_answer_of_3000_bytes_comes_whole() {
    scenario(&Setup::new(), |bench| {
        let whole =
            |output: &str| output.matches("IN\tTXT\t").count() == 12 && !output.contains("flags: qr tc");
        let size = |output: &str| -> usize {
            let line = output.lines().find(|line| line.contains("MSG SIZE")).unwrap_or_default();
            line.split_whitespace().last().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        for how in [&["+bufsize=4096", "+ignore"][..], &["+tcp"], &["+noedns"], &["+bufsize=1232"]] {
            let output = dig(bench, &[how, &["TXT", BIG_TXT_NAME]].concat())?;
            ensure!(whole(&output) && size(&output) > BIG_TXT_BYTES, "{how:?}: {output}");
        }
        // Without room and without a retry over TCP the answer says that it is truncated.
        let short = dig(bench, &["+noedns", "+ignore", "TXT", BIG_TXT_NAME])?;
        ensure!(short.contains(" tc ") || short.contains(" tc;"), "no TC bit: {short}");
        ensure!(size(&short) <= 512, "{} bytes without EDNS", size(&short));
        Ok(())
    });
}

#[test]
fn dnssec_ok_reaches_the_upstream() {
    scenario(&Setup::new(), |bench| {
        let output = dig(bench, &["+dnssec", "A", &format!("www.{DOMAIN}")])?;
        ensure!(output.contains("EDNS: version: 0, flags: do"), "the DO bit was lost: {output}");
        Ok(())
    });
}

#[test]
fn local_names_are_the_gateways_own() {
    let setup = Setup::new().vunet(&["--dns-host", "printer=192.0.2.77"]);
    scenario(&setup, |bench| {
        let gateway = GATEWAY.to_string();
        for (name, want) in [
            ("host.vunet.internal", &*gateway),
            ("host.docker.internal", &*gateway),
            ("gateway.docker.internal", &*gateway),
            ("printer.vunet.internal", "192.0.2.77"),
        ] {
            let got = dig(bench, &["+short", "A", name])?;
            ensure!(got.trim() == want, "{name}: {got:?} instead of {want}");
        }
        let reverse = dig(bench, &["+short", "-x", &gateway])?;
        ensure!(reverse.contains("vunet.internal."), "PTR of the gateway: {reverse:?}");
        Ok(())
    });
}

#[test]
fn a_named_upstream_is_used() {
    let server = WORLD.to_string();
    scenario(&Setup::new().vunet(&["--dns-server", &server]), |bench| {
        bench.lab.host.set_resolver("192.0.2.99")?;
        let got = dig(bench, &["+short", "A", &format!("www.{DOMAIN}")])?;
        ensure!(got.trim() == server, "{got:?}");
        Ok(())
    });
}
