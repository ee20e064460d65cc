package erofsd

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
)

// patience is how long a daemon may need to begin, to answer and to end.
const patience = 20 * time.Second

// A process is erofsd as it runs.
type process struct {
	cmd    *exec.Cmd
	socket string
	said   testenv.Buffer
	client *http.Client
}

// begin starts erofsd by the name of args[0] and waits until its API answers.
func begin(t *testing.T, environ []string, socket string, args ...string) *process {
	t.Helper()
	return beginProgram(t, "/proc/self/exe", environ, socket, args...)
}

// beginProgram is begin of another program than this one.
func beginProgram(t *testing.T, program string, environ []string, socket string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(program), socket: socket}
	p.cmd.Args = args
	p.cmd.Env = append(os.Environ(), environ...)
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	})
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	p.client = &http.Client{Transport: transport, Timeout: patience}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, err := p.call("GET", "/api/v1/daemon", ""); err == nil {
			return p
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v does not answer; it said:\n%s", args, p.said.String())
		}
	}
}

// call calls the API and returns the answer: status and body.
func (p *process) call(method, target, body string) (string, error) {
	req, err := http.NewRequest(method, "http://nydus"+target, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	res, err := p.client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.Status + " " + string(text), err
}

// want calls the API, which must answer with the given text in it.
func (p *process) want(t *testing.T, method, target, body, want string) {
	t.Helper()
	if got, err := p.call(method, target, body); err != nil || !strings.Contains(got, want) {
		t.Errorf("%s %s: %s, %v; want %s", method, target, got, err, want)
	}
}

// end waits for the process, which must end with the given code.
func (p *process) end(t *testing.T, code int) {
	t.Helper()
	stop := time.AfterFunc(patience, func() { p.cmd.Process.Kill() })
	_ = p.cmd.Wait() // the code says it
	if !stop.Stop() {
		t.Errorf("it did not end; it said:\n%s", p.said.String())
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("exit code %d, want %d; it said:\n%s", got, code, p.said.String())
	}
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// left reports whether the socket is still there.
func (p *process) left() bool {
	_, err := os.Lstat(p.socket)
	return err == nil
}

// TestUpgradeProcess: nydusd's command line as nydus-snapshotter writes it, waiting for a takeover,
// which needs nothing of the kernel.
func TestUpgradeProcess(t *testing.T) {
	dir := testDir(t)
	socket := filepath.Join(dir, "api.sock")
	args := []string{
		"nydusd", "singleton", "--fscache", dir, "--fscache-threads", "4", "--upgrade", "--id", "daemon-1", "--apisock", socket,
		"--log-level", "info", "--log-rotation-size", "100", "--supervisor", filepath.Join(dir, "none.sock"), "--root", filepath.Join(dir, "root"),
		"--log-file", filepath.Join(dir, "log", "nydusd"),
	}
	p := begin(t, nil, socket, args...)
	p.want(t, "GET", "/api/v1/daemon", "", `"id":"daemon-1","supervisor":"`+filepath.Join(dir, "none.sock")+`","state":"INIT"`)
	p.want(t, "PUT", "/api/v1/daemon/start", "", `400 Bad Request`)
	p.want(t, "PUT", "/api/v1/daemon", `{"log_level":"debug"}`, "204")
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st.Mode(), err)
	}
	p.signal(t, syscall.SIGTERM)
	p.end(t, 0)
	if p.left() {
		t.Error("the socket is still there")
	}
	log, err := os.ReadFile(filepath.Join(dir, "log", "nydusd_rCURRENT.log"))
	for _, want := range []string{"INFO Program Version: ", "INFO HTTP API server running at " + socket, "INFO nydusd quits"} {
		if !bytes.Contains(log, []byte(want)) {
			t.Errorf("the log lacks %q, %v:\n%s", want, err, log)
		}
	}
	if said := p.said.String(); said != "" {
		t.Errorf("it said beside the log: %s", said)
	}
}

// TestEnds: every way to end a daemon, and whether its socket shows a crash afterwards.
func TestEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		signal syscall.Signal
		code   int
		left   bool
	}{
		"SIGINT":  {syscall.SIGINT, 0, false},
		"SIGTERM": {syscall.SIGTERM, 0, false},
		"exit":    {0, 0, false},
		"SIGHUP":  {syscall.SIGHUP, -1, true},
		"SIGKILL": {syscall.SIGKILL, -1, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := testDir(t)
			socket := filepath.Join(dir, "api.sock")
			args := []string{"nydusd", "singleton", "--upgrade", "-A", socket, "--root", filepath.Join(dir, "root")}
			p := begin(t, []string{"RUST_LOG=off"}, socket, args...)
			for _, s := range []syscall.Signal{syscall.SIGPIPE, syscall.SIGUSR1, syscall.SIGUSR2} {
				p.signal(t, s) // changes nothing
			}
			p.want(t, "GET", "/api/v1/daemon", "", `"INIT"`)
			if tc.signal == 0 {
				p.want(t, "PUT", "/api/v1/daemon/exit", "", "204")
			} else {
				p.signal(t, tc.signal)
			}
			p.end(t, tc.code)
			if p.left() != tc.left {
				t.Errorf("the socket is there: %v", p.left())
			}
			if said := p.said.String(); said != "" {
				t.Errorf("RUST_LOG=off, and it said: %s", said)
			}
			// The next one takes the place, whatever is left there.
			again := begin(t, nil, socket, args...)
			again.signal(t, syscall.SIGTERM)
			again.end(t, 0)
		})
	}
}

// TestSocketTaken: a second daemon does not take the socket of a live one.
func TestSocketTaken(t *testing.T) {
	dir := testDir(t)
	socket := filepath.Join(dir, "api.sock")
	args := []string{"nydusd", "singleton", "--upgrade", "-A", socket, "--root", filepath.Join(dir, "root")}
	p := begin(t, nil, socket, args...)
	said, code := erofsd(t, nil, args[1:]...)
	if code != 1 || !strings.Contains(said, "another daemon answers there") {
		t.Errorf("exit code %d: %s", code, said)
	}
	p.want(t, "GET", "/api/v1/daemon", "", `"INIT"`)
	p.signal(t, syscall.SIGTERM)
	p.end(t, 0)
}

// TestServes: a whole daemon by its configuration file.
func TestServes(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fanotify", fanotify.Supported(testDir(t)))
	dir := testDir(t)
	socket := filepath.Join(dir, "s", "api.sock")
	file := filepath.Join(dir, "erofsd.toml")
	text := "[daemon]\nroot = '" + filepath.Join(dir, "root") + "'\nsocket = '" + socket + "'\ntransport = 'fanotify'\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := begin(t, nil, socket, Name, "--config", file, "--log-level", "debug")
	p.want(t, "GET", "/api/v1/daemon", "", `"state":"RUNNING"`)
	p.signal(t, syscall.SIGTERM)
	p.end(t, 0)
	if p.left() {
		t.Error("the socket is still there")
	}
	if said := p.said.String(); !strings.Contains(said, "State machine(pid=") {
		t.Errorf("it said: %s", said)
	}
}
