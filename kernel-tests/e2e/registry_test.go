package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// at is the configuration of a registry.
func at(host, scheme string, more ...object) object {
	keys := object{"scheme": scheme, "host": host, "repo": repo, "timeout": 5, "connect_timeout": 2}
	for _, o := range more {
		for k, v := range o {
			keys[k] = v
		}
	}
	return keys
}

// registries reads from docker-registry in all the ways that there are to log in and to
// find it.
func (w *world) registries(t *testing.T) {
	t.Run("docker-config", w.dockerConfig) // changes the environment, so by itself
	for name, run := range map[string]func(t *testing.T){
		"plain": w.plain, "basic": w.basic, "bearer-token-expires": w.tokenExpires, "tls": w.tls,
		"several": w.several, "hosts-toml": w.hostsTOML, "reference": w.byReference,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t)
		})
	}
}

func (w *world) plain(t *testing.T) {
	reg := w.seeded(t, services.RegistryOptions{})
	for name, mount := range map[string]func(m *machine) string{
		"v1":      func(m *machine) string { return m.mount(t, "registry", at(reg.Addr, "http")) },
		"v2":      func(m *machine) string { return m.mount2(t, "registry", at(reg.Addr, "http")) },
		"fscache": func(m *machine) string { return m.bind(t, "", "registry", at(reg.Addr, "http")) },
	} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			m.whole(t, mount(m))
		})
	}
}

func (w *world) basic(t *testing.T) {
	reg := w.seeded(t, services.RegistryOptions{Login: true})
	m := w.start(t)
	m.whole(t, m.mount(t, "registry", at(reg.Addr, "http", object{"auth": services.Auth()})))
	stranger := w.start(t)
	stranger.refused(t, "registry", at(reg.Addr, "http"), "it wants a login and there is none")
	wrong := base64.StdEncoding.EncodeToString([]byte(services.User + ":guess"))
	stranger.refused(t, "registry", at(reg.Addr, "http", object{"auth": wrong}), "401")
}

// tokenExpires reads for several times as long as the registry takes a token, though it was
// said to live longer.
func (w *world) tokenExpires(t *testing.T) {
	const lifetime = 2 * time.Second
	tokens := services.NewTokenServer(t, lifetime)
	reg := w.seeded(t, services.RegistryOptions{Token: tokens})
	m := w.start(t)
	point := m.mount(t, "registry", at(reg.Addr, "http", object{"auth": services.Auth()}))
	names := w.files("data/")
	for i := range 2 {
		if i > 0 {
			time.Sleep(lifetime + time.Second) // it counts whole seconds
		}
		m.mustRead(t, point, names[2*i:2*i+2]...)
		if n := tokens.Issued(); n != i+1 {
			t.Errorf("round %d: %d tokens were fetched, want one in each", i, n)
		}
	}
	w.load(t, point).wait(t, bound)
	m.whole(t, point)
}

func (w *world) tls(t *testing.T) {
	ca := services.NewCA(t)
	reg := w.seeded(t, services.RegistryOptions{TLS: ca})
	for name, keys := range map[string]object{"ca": {"ca_cert_files": []string{ca.File}}, "skip-verify": {"skip_verify": true}} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			m.whole(t, m.mount(t, "registry", at(reg.Addr, "https", keys)))
		})
	}
	t.Run("unknown", func(t *testing.T) {
		m := w.start(t)
		m.refused(t, "registry", at(reg.Addr, "https"), "certificate signed by unknown authority")
	})
}

// dockerConfig takes the login from docker's configuration, by itself and by a helper.
func (w *world) dockerConfig(t *testing.T) {
	reg := w.seeded(t, services.RegistryOptions{Login: true})
	for name, config := range map[string]object{
		"auths":       {"auths": object{reg.Addr: object{"auth": services.Auth()}}},
		"credHelpers": {"credHelpers": object{reg.Addr: "erofsd-e2e"}},
		"credsStore":  {"credsStore": "erofsd-e2e"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			text, err := json.Marshal(config)
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "config.json"), string(text), 0o600)
			write(t, filepath.Join(dir, "docker-credential-erofsd-e2e"), fmt.Sprintf(
				"#!/bin/sh\nread host\n[ \"$1 $host\" = \"get %s\" ] || exit 1\necho '{\"Username\":\"%s\",\"Secret\":\"%s\"}'\n",
				reg.Addr, services.User, services.Password), 0o700)
			t.Setenv("DOCKER_CONFIG", dir)
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			m := w.start(t)
			m.whole(t, m.mount(t, "registry", at(reg.Addr, "http", object{"credentials": "docker"})))
		})
	}
}

func write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// several has images of registries with other logins and protocols mounted at once; each in
// its domain, as they have the same blob.
func (w *world) several(t *testing.T) {
	ca := services.NewCA(t)
	tokens := services.NewTokenServer(t, time.Minute)
	m := w.start(t)
	points := map[string]string{
		"plain": m.bind(t, "plain", "registry", at(w.seeded(t, services.RegistryOptions{}).Addr, "http")),
		"basic": m.bind(t, "basic", "registry", at(w.seeded(t, services.RegistryOptions{Login: true}).Addr, "http", object{"auth": services.Auth()})),
		"token": m.bind(t, "token", "registry", at(w.seeded(t, services.RegistryOptions{Token: tokens}).Addr, "http", object{"auth": services.Auth()})),
		"tls":   m.bind(t, "tls", "registry", at(w.seeded(t, services.RegistryOptions{TLS: ca}).Addr, "https", object{"ca_cert_files": []string{ca.File}})),
	}
	loads := map[string]*load{}
	for name, point := range points {
		loads[name] = w.load(t, point)
	}
	for _, l := range loads {
		l.wait(t, bound)
	}
	for _, point := range points {
		w.compare(t, point)
	}
	if n := tokens.Issued(); n != 1 {
		t.Errorf("%d tokens were fetched", n)
	}
}

// hostsTOML reads a registry that exists by containerd's configuration alone, with its
// mirror and without.
func (w *world) hostsTOML(t *testing.T) {
	origin, mirror := w.seeded(t, services.RegistryOptions{}), w.seeded(t, services.RegistryOptions{})
	hosts := t.TempDir()
	dir := filepath.Join(hosts, "registry.invalid_5000_")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "hosts.toml"), fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
		origin.Addr, mirror.Addr), 0o600)
	origin.Kill()
	m := w.start(t)
	point := m.mount(t, "registry", at("registry.invalid:5000", "https", object{"hosts_dir": hosts}))
	m.mustRead(t, point, w.files("data/")[:4]...)
	origin.Start(t)
	mirror.Kill()
	m.whole(t, point)
	if !strings.Contains(m.log(t), "mirror is unhealthy") {
		t.Error("the log says nothing of the mirror")
	}
}

// byReference mounts by our own API: the manifest too is the registry's.
func (w *world) byReference(t *testing.T) {
	ca := services.NewCA(t)
	plain, tls := w.seeded(t, services.RegistryOptions{}), w.seeded(t, services.RegistryOptions{TLS: ca})
	for name, r := range map[string]api.MountRequest{
		"http":  {Reference: plain.Addr + "/" + repo + ":1", PlainHTTP: true},
		"https": {Reference: tls.Addr + "/" + repo + ":1", CAFile: ca.File},
	} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			r.Mountpoint = m.point(t)
			if _, err := m.Mount(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			m.whole(t, r.Mountpoint)
		})
	}
}
