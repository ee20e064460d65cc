package systemd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// The commands of docs/install.md that are not run as they are.
const (
	makeCommand   = "make build && make install"                                                         // the test builds
	nerdctlRun    = "nerdctl --snapshotter=erofsd run --rm HOST/team/app:lazy true"                      // Debian has none: its pull by its library
	convertRun    = "erofsctl convert app.tar.gz HOST/team/app:lazy"                                     // this registry has no TLS
	ctrRun        = "ctr run --snapshotter erofsd --rm --cpu-shares 0 HOST/team/app:lazy app /bin/check" // after that pull
	registryInDoc = "registry.example"
)

// TestInstall does what docs/install.md says, command by command, on a machine that has
// Debian's containerd and nothing of ours, up to a container whose image has not arrived, and
// away again.
func TestInstall(t *testing.T) {
	requireHost(t)
	services.Containerd(t)
	registry := services.Registry(t, services.RegistryOptions{}).Addr
	m := boot(t, setup{unit: "containerd-erofsd-grpc.service", fresh: true})
	build(t, "build", "-o", filepath.Join(m.dir, "bin")+"/", "./cmd/...")
	want := m.app()
	steps := m.commands(t, "docs/install.md", strings.NewReplacer(registryInDoc, registry))
	reference := registry + "/team/app:lazy"
	m.do(steps["1. Programs"], makeCommand)
	m.do(steps["2. The service"])
	m.run("sed", "-i", fmt.Sprintf(`s/^plain_http = .*/plain_http = ["%s"]/`, registry), "/etc/erofsd/containerd-erofsd.toml")
	m.run("systemctl", "restart", "containerd-erofsd-grpc")
	m.do(steps["3. containerd"])
	for _, line := range steps["4. An image"] {
		switch strings.ReplaceAll(line, registry, "HOST") {
		case convertRun:
			m.run("sh", "-ec", "cd /source; "+strings.Replace(line, "convert", "convert --plain-http", 1))
		case nerdctlRun:
			m.pull(reference)
			got := m.run("sh", "-ec", strings.ReplaceAll(ctrRun, "HOST", registry))
			if got != want {
				t.Errorf("the container printed %q, want %q", got, want)
			}
		default:
			if out := m.shell(line); !strings.Contains(out, "served lazily (mounted)") {
				t.Errorf("%s: %s", line, out)
			}
		}
	}
	if out, err := m.try("erofsctl", "doctor", "--registry", "http://"+registry); err != nil {
		t.Errorf("%v\n%s", err, out)
	} else if !strings.Contains(out, "ok       containerd   /etc/containerd/config.toml has the snapshotter erofsd\n") {
		t.Errorf("doctor does not see it:\n%s", out)
	}
	// What was installed is restarted; the image goes on.
	before := m.daemonPID()
	m.run("systemctl", "restart", "containerd-erofsd-grpc", "containerd")
	if after := m.daemonPID(); after != before {
		t.Errorf("erofsd was %d and is %d", before, after)
	}
	again := func() bool {
		out, err := m.try("sh", "-ec", strings.ReplaceAll(ctrRun, "HOST", registry))
		if err == nil && out != want {
			t.Errorf("the container printed %q, want %q", out, want)
		}
		return err == nil
	}
	m.await("the container after a restart", again)
	// One program takes the place of two.
	m.run("sed", "-i", `s/^mode = "start"/mode = "embedded"/`, "/etc/erofsd/containerd-erofsd.toml")
	m.run("rm", "/usr/local/bin/erofsd")
	m.run("systemctl", "restart", "containerd-erofsd-grpc")
	m.await("erofsd to be the snapshotter's program", func() bool {
		out, err := m.try("readlink", fmt.Sprintf("/proc/%d/exe", m.daemonPID()))
		return err == nil && strings.TrimSpace(out) == "/usr/local/bin/containerd-erofsd-grpc"
	})
	m.await("the container after that", again)
	m.unpull(reference)
	m.do(steps["Away again"])
	m.await("nothing to be mounted", func() bool {
		out, _ := m.try("findmnt", "--noheadings", "--types", "erofs") // fails when there is none
		return strings.TrimSpace(out) == ""
	})
}

// app makes app.tar.gz, an image with the program check and what it reads, and returns what
// that prints.
func (m *machine) app() (want string) {
	m.t.Helper()
	program := filepath.Join(m.t.TempDir(), "check")
	build(m.t, "build", "-o", program, "./kernel-tests/containerd/testdata/check")
	text, err := os.ReadFile(program)
	if err != nil {
		m.t.Fatal(err)
	}
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	archive := tar.NewWriter(zip)
	add := func(name string, mode int64, p []byte) {
		herr := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(p)), Mode: mode})
		_, werr := archive.Write(p)
		err = errors.Join(err, herr, werr)
	}
	add("bin/check", 0o755, text)
	seed := newSeed(m.t)
	all, random := sha256.New(), rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	for i := range 20 {
		p := make([]byte, 100_000)
		_, _ = random.Read(p) // never fails
		name := fmt.Sprintf("/data/%02d", i)
		add(name[1:], 0o644, p)
		fmt.Fprintf(all, "%s %x\n", name, sha256.Sum256(p))
	}
	err = errors.Join(err, archive.Close(), zip.Close())
	if err == nil {
		err = os.WriteFile(filepath.Join(m.dir, "source", "app.tar.gz"), packed.Bytes(), 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return fmt.Sprintf("read %x\n", all.Sum(nil))
}

// commands are the lines of the blocks of shell commands of a document, by section.
func (m *machine) commands(t *testing.T, name string, replace *strings.Replacer) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(testenv.ModuleRoot(t), name))
	if err != nil {
		t.Fatal(err)
	}
	found, section, inside := map[string][]string{}, "", false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```sh"
		case inside:
			command, _, _ := strings.Cut(line, "  #")
			found[section] = append(found[section], replace.Replace(strings.TrimSpace(command)))
		case strings.HasPrefix(line, "## "):
			section = strings.TrimPrefix(line, "## ")
		}
	}
	return found
}

// do runs the commands of a section, but those that are done already.
func (m *machine) do(lines []string, done ...string) {
	m.t.Helper()
	if len(lines) == 0 {
		m.t.Fatal("the document has no such section, or no commands in it")
	}
	for _, line := range lines {
		if !slices.Contains(done, line) {
			m.shell(line)
		}
	}
}

// shell runs a line in the directory of the source.
func (m *machine) shell(line string) string {
	m.t.Helper()
	m.t.Log("$ " + line)
	return m.run("sh", "-ec", "cd /source; "+line)
}

// daemonPID is the worker of erofsd.
func (m *machine) daemonPID() (pid int) {
	m.t.Helper()
	m.await("erofsd", func() bool {
		v, err := m.Version(m.t.Context())
		pid = v.PID
		return err == nil
	})
	return pid
}

// containerd calls do with a client of the machine's containerd.
func (m *machine) containerd(do func(ctx context.Context, c *client.Client) error) {
	m.t.Helper()
	c, err := client.New(m.path("/run/containerd/containerd.sock"))
	if err != nil {
		m.t.Fatal(err)
	}
	err = do(namespaces.WithNamespace(m.t.Context(), "default"), c)
	if err := errors.Join(err, c.Close()); err != nil {
		m.t.Fatal(err)
	}
}

// pull pulls as nerdctl does.
func (m *machine) pull(reference string) {
	m.t.Helper()
	plain := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	m.containerd(func(ctx context.Context, c *client.Client) error {
		_, err := c.Pull(ctx, reference, client.WithPullUnpack, client.WithPullSnapshotter("erofsd"),
			client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: plain})),
			client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(reference)))
		return err
	})
}

// unpull removes an image, and what containerd keeps for it.
func (m *machine) unpull(reference string) {
	m.t.Helper()
	m.containerd(func(ctx context.Context, c *client.Client) error {
		return c.ImageService().Delete(ctx, reference, images.SynchronousDelete())
	})
}
