package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestCpio(t *testing.T) {
	tool := testenv.Tool(t, "cpio")
	from := filepath.Join(t.TempDir(), "program")
	big := bytes.Repeat([]byte("0123456"), 5000) // its size is no multiple of four
	if err := os.WriteFile(from, big, 0o700); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	c := newCpio(&archive)
	c.program("/program/a.test", from)
	c.text("/etc/hosts", "one\n")
	c.text("/etc/deep/er/empty", "")
	c.dir("/etc/deep/er") // is there already
	c.symlink("/bin/sh", "busybox")
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), tool, "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dir, &archive
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, want := range map[string]string{"program/a.test": string(big), "etc/hosts": "one\n", "etc/deep/er/empty": ""} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s has %d bytes, want %d, error %v", name, len(got), len(want), err)
		}
	}
	if target, err := os.Readlink(filepath.Join(dir, "bin/sh")); target != "busybox" {
		t.Errorf("the link leads to %q, %v", target, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "program/a.test"), &st); err != nil || st.Mode != unix.S_IFREG|0o755 {
		t.Errorf("the program has mode %o, %v", st.Mode, err)
	}
}

func TestCpioKeepsItsError(t *testing.T) {
	c := newCpio(new(bytes.Buffer))
	c.program("/init", filepath.Join(t.TempDir(), "missing"))
	c.text("/etc/hosts", "one\n")
	if err := c.close(); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("an archive without its program has the error %v", err)
	}
	c = newCpio(new(bytes.Buffer))
	c.add("/grown", unix.S_IFREG, 3, strings.NewReader("four"))
	if err := c.close(); err == nil {
		t.Error("a file that grew while it was read gives no error")
	}
}

func TestCheckStatic(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	static := filepath.Join(t.TempDir(), "static")
	build(t, "build", "-o", static, ".")
	for name, want := range map[string]string{static: "", text: "no program for the guest", testenv.Tool(t, "tar"): "CGO_ENABLED=0"} {
		err := checkStatic(name)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

func TestShares(t *testing.T) {
	for _, tc := range []struct {
		folders, want []string
	}{
		{[]string{"/a/m", "/a/shared"}, []string{"/a/m", "/a/shared"}},
		{[]string{"/a/m", "/a/shared", "/a/shared/fixtures"}, []string{"/a/m", "/a/shared"}},
		{[]string{"/a/m/x", "/a/m", "/a/m"}, []string{"/a/m"}},
		{[]string{"/a/m", "/a/mm"}, []string{"/a/m", "/a/mm"}},
	} {
		list, err := shares(slices.Clone(tc.folders))
		var got []string
		for _, s := range list {
			got = append(got, s.Path)
		}
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%q gives the shares %q, %v, want %q", tc.folders, got, err, tc.want)
		}
	}
	if _, err := shares([]string{"/a,readonly=off"}); err == nil {
		t.Error("a path that QEMU would take for options is shared")
	}
}

func TestPrepare(t *testing.T) {
	t.Setenv("EROFSD_FIXTURES", t.TempDir())
	t.Setenv("GODEBUG", "a=b")
	m := &machine{stdout: os.Stdout, stderr: os.Stdout}
	if err := m.addEnv("NAME"); err == nil {
		t.Error("a variable without a value is taken")
	}
	if err := m.addEnv("NAME=a=b"); err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	if err := m.addShare(filepath.Join(folder, "none")); err == nil {
		t.Error("a folder that is not there is shared")
	}
	if err := m.addShare(folder); err != nil {
		t.Fatal(err)
	}
	if err := m.prepare("6.1", []string{"./x.test", "-test.v"}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/program/x.test", "-test.v"}; !slices.Equal(m.job.Args, want) {
		t.Errorf("the guest runs %q, want %q", m.job.Args, want)
	}
	if m.job.Stderr {
		t.Error("one file for both outputs makes two ports")
	}
	for _, want := range []string{"EROFSD_GUEST=6.1", "GODEBUG=a=b", "TEST_MUST_RUN=root,cachefiles,memory cgroup,fixtures", "EROFSD_TEST_DIR=/cache", "NAME=a=b"} {
		if !slices.Contains(m.job.Env, want) {
			t.Errorf("the program's environment %q has no %s", m.job.Env, want)
		}
	}
	if m.job.Shares[0].Path != testenv.ModuleRoot(t) {
		t.Errorf("the first share is %q, want the module", m.job.Shares[0].Path)
	}
	if last := m.job.Shares[len(m.job.Shares)-1]; last.Path != folder {
		t.Errorf("the last share is %q, want %q", last.Path, folder)
	}
	m = &machine{stdout: os.Stdout, stderr: os.Stdout}
	if err := m.prepare("6.1", []string{"sh", "-c", "true"}); err != nil || m.job.Args[0] != "sh" || m.program != "" {
		t.Errorf("a bare name runs %q from the host's %q, error %v", m.job.Args, m.program, err)
	}
}

func TestFurtherDisks(t *testing.T) {
	dir := t.TempDir()
	disk, writes := filepath.Join(dir, "disk"), filepath.Join(dir, "writes")
	var m machine
	if err := m.addDisk(disk); err == nil {
		t.Error("a disk that is not there is one")
	}
	m.writes = writes
	if err := m.logWrites(); err == nil {
		t.Error("the writes of no disk are logged")
	}
	for _, name := range []string{disk, filepath.Join(dir, "a,b"), writes} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.addDisk(filepath.Join(dir, "a,b")); err == nil {
		t.Error("a path that QEMU would take for options is a disk")
	}
	m.disks = nil
	if err := errors.Join(m.addDisk(disk), m.logWrites()); err != nil {
		t.Fatal(err)
	}
	if p, err := os.ReadFile(writes); err != nil || len(p) > 0 {
		t.Errorf("the log of an earlier guest is there still: %q, %v", p, err)
	}
	args := strings.Join(m.furtherDisks(), " ")
	for _, want := range []string{"filename=" + disk, "filename=" + writes, "file=disk0,log=writes", "drive=logged"} {
		if !strings.Contains(args, want) {
			t.Errorf("QEMU's options have no %s: %s", want, args)
		}
	}
}

func TestJudge(t *testing.T) {
	const boot = "Linux version\n[ 1.0] " + startMark + "\n"
	for name, tc := range map[string]struct {
		o      outcome
		code   int
		says   []string
		silent string
	}{
		"pass":          {outcome{result: &result{}, kernelLog: boot}, 0, nil, "vm:"},
		"fail":          {outcome{result: &result{Exit: 1}, kernelLog: boot + "then\n" + endMark + "\npower down\n"}, 1, []string{"then\n"}, "power down"},
		"problem":       {outcome{result: &result{Exit: 125, Problem: "no disk"}}, 125, []string{"no disk"}, "complains"},
		"complaint":     {outcome{result: &result{}, kernelLog: boot + "WARNING: CPU: 0\n"}, 1, []string{"complains (WARNING:)", "WARNING: CPU"}, "without a result"},
		"hung task":     {outcome{result: &result{}, kernelLog: boot + "INFO: task cat:7 blocked for more than 60 seconds.\n"}, 1, []string{"complains"}, "stopped"},
		"early trouble": {outcome{result: &result{}, kernelLog: "BUG: at boot\n" + boot}, 1, []string{"BUG: at boot"}, "stopped"},
		"died":          {outcome{kernelLog: "Linux version\n"}, exitProblem, []string{"without a result", "Linux version"}, "stopped"},
		"stopped":       {outcome{timedOut: true, result: &result{}}, 1, []string{"stopped after 1m0s"}, "without"},
		"a debugger":    {outcome{result: &result{}, kernelLog: boot + "DEBUG: fine\n"}, 0, nil, "complains"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			if code := tc.o.judge(&out, time.Minute); code != tc.code {
				t.Errorf("code %d, want %d", code, tc.code)
			}
			out.WriteString(tc.o.logExcerpt())
			for _, want := range tc.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("it does not say %q:\n%s", want, out.String())
				}
			}
			if strings.Contains(out.String(), tc.silent) {
				t.Errorf("it says %q:\n%s", tc.silent, out.String())
			}
		})
	}
}
