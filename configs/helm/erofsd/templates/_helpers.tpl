{{- define "erofsd.name" -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "erofsd.account" -}}
{{- .Values.serviceAccount.name | default (include "erofsd.name" .) -}}
{{- end -}}

{{- define "erofsd.selector" -}}
app.kubernetes.io/name: erofsd
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "erofsd.labels" -}}
{{ include "erofsd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "erofsd.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "erofsd.withSecrets" -}}
{{- if has "secrets" .Values.credentials.providers -}}true{{- end -}}
{{- end -}}

{{- /* The flags of erofsctl node, which all of its commands have. */ -}}
{{- define "erofsd.flags" -}}
- --host=/host
- --bin={{ .Values.host.bin }}
{{- if and (eq .Values.action "install") (include "erofsd.withSecrets" .) }}
- --account=/var/run/secrets/kubernetes.io/serviceaccount
{{- end }}
{{- with .Values.containerd.dropIn }}
- --containerd-drop-in={{ . }}
{{- end }}
{{- if .Values.containerd.restart }}
- --restart-containerd
{{- end }}
{{- end -}}
